"""
What the user's own settings of Claude Code and Codex would refuse all night: `ledger.py start` names the rules.

An unattended client refuses what it would ask about, and any file of settings may be the strictest. The settings of
this repository are in .claude/ and .codex/.
"""

import ast
import fnmatch
import json
import os
import re
import shlex
from pathlib import Path

from harness import common
from harness.common import first_line

# What the agent does for each idea
LINES = (
    "uv run ledger.py",
    "uv run ledger.py run",
    'uv run python -c "import train"',
    "git commit -q -m 'an idea' -- train.py",
    "git reset -q --keep HEAD",
)


def warnings():
    """[sentence], one for each rule."""
    return [*claude_warnings(), *codex_warnings()]


def home_of(variable, folder):
    return Path(os.environ.get(variable) or os.path.expanduser(f"~/{folder}"))


def claude_warnings():
    found = []
    of_user = home_of("CLAUDE_CONFIG_DIR", ".claude") / "settings.json"
    for path in (of_user, common.ROOT / ".claude" / "settings.local.json"):
        try:
            # a mode of the user's own gives way to that of this repository, another local one does not
            permissions = json.loads(path.read_text()).get("permissions", {})
            rules = [*permissions.get("deny", []), *permissions.get("ask", [])]
            if path != of_user and permissions.get("defaultMode") == "plan":
                found.append(f'{path} has "defaultMode": "plan", so Claude Code edits nothing: remove it')
        except (FileNotFoundError, NotADirectoryError):
            continue
        except (OSError, ValueError, AttributeError, TypeError) as error:
            found.append(f"{path} can't be read, so Claude Code may refuse anything: {first_line(error)}")
            continue
        for rule in rules:
            refused = refused_by_claude(str(rule))
            if refused:
                found.append(f"{path} has the rule {rule}, so Claude Code refuses {refused}: remove it for the night")
    return found


def refused_by_claude(rule):
    """The action of the agent that this rule of `deny` or `ask` would refuse, in words; "" if there is none."""
    # Bash, Bash(git *), Bash(git:*), Edit(/train.py)
    tool, _, pattern = rule.rstrip(")").partition("(")
    pattern = re.sub(r":\*$", "*", pattern) or "*"
    if tool == "Edit":
        # as in .gitignore
        in_a_folder = re.sub(r"^(\./|/)?(\*\*/)*", "", pattern)
        if fnmatch.fnmatchcase("train.py", in_a_folder):
            return "the edit of train.py"
    if tool != "Bash":
        return ""
    return next((f"`{line}`" for line in LINES if fnmatch.fnmatchcase(line, pattern)), "")


def codex_warnings():
    """Codex takes the strictest rule; approval_policy, sandbox_mode and permissions are those of this repository."""
    found = []
    # the rules of all files hold, and an unattended Codex takes a prompt for a refusal
    for path in sorted(home_of("CODEX_HOME", ".codex").glob("rules/*.rules")):
        try:
            rules = read_prefix_rules(path.read_text())
        except (OSError, ValueError, SyntaxError) as error:
            found.append(f"{path} can't be read, so Codex may refuse anything: {first_line(error)}")
            continue
        for pattern, decision in rules:
            line = next((line for line in LINES if has_prefix(shlex.split(line), pattern)), "")
            if line and decision in ("prompt", "forbidden"):
                rule = shlex.join(str(word) for word in pattern)
                found.append(
                    f"{path} has the rule {rule}: {decision}, so Codex refuses `{line}`: remove it for the night"
                )
    return found


def read_prefix_rules(text):
    """The rules of a file of Codex's: [(pattern, decision)]. They are written like calls in Python."""
    rules = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "prefix_rule":
            given = {keyword.arg: keyword.value for keyword in node.keywords}
            values = {name: ast.literal_eval(given[name]) for name in ("pattern", "decision") if name in given}
            rules.append((values.get("pattern"), values.get("decision", "allow")))
    return rules


def has_prefix(words, pattern):
    """Whether a command begins like that. A part of a pattern is a word, or a list of words of which one is there."""
    if not isinstance(pattern, list) or not 0 < len(pattern) <= len(words):
        return False
    choices = [part if isinstance(part, list) else [part] for part in pattern]
    return all(word in choice for word, choice in zip(words, choices, strict=False))
