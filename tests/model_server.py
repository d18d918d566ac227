"""
A scripted model for Claude Code and Codex: plays a list of tool calls, one a turn, and records what comes back.

    model_server.py steps.json record.jsonl [port]     # prints the port, serves until it is killed

steps.json is a list of {"name": ..., "bash": "command"}, or with "edit": [path, old, new], "write": [path, text],
"read": path, "patch": text or "say": text instead; a bash step may have "timeout" in ms. In a command, {{name:regex}}
stands for the first group of regex in the result of the step called name. Files in $WATCH (colons between them) are put
back when a step changed them, and it is recorded that it did. Standard library only. Claude Code speaks POST
/v1/messages, Codex POST /v1/responses, both as server-sent events.
"""

import json
import os
import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

STEPS = json.load(open(sys.argv[1]))
RECORD = sys.argv[2]
LOCK = threading.Lock()
RESULTS = {}  # index of a step -> text that came back
PARTS, POLL = {}, {}  # Codex gives a command back while it runs: its pieces of output, and the session to ask for more
SEEN = {"requests": 0, "tools": None}


def record(**entry):
    with open(RECORD, "a") as file:
        file.write(json.dumps(entry) + "\n")


def text_of(content):
    """The text of a tool result, of either API."""
    if isinstance(content, str):
        return content
    if isinstance(content, dict):
        return text_of(content.get("content") or content.get("output") or json.dumps(content))
    return "".join(block.get("text", "") if isinstance(block, dict) else str(block) for block in content or [])


def fill(text):
    def found(match):
        index = next((i for i, step in enumerate(STEPS) if step["name"] == match[1]), None)
        hit = re.search(match[2], RESULTS.get(index, ""), re.M)
        return hit[1] if hit else "NOT-FOUND"

    return re.sub(r"\{\{([\w ,.-]+):(.*?)\}\}", found, text)


def contents(path):
    try:
        with open(path, "rb") as file:
            return file.read()
    except OSError:
        return None


WATCHED = {path: contents(path) for path in os.environ.get("WATCH", "").split(":") if path}  # put back when changed


def came_back(index, text, error):
    if index not in RESULTS:
        RESULTS[index] = text
        changed = [path for path, before in WATCHED.items() if contents(path) != before]
        for path in changed:
            if WATCHED[path] is None:
                os.remove(path)
            else:
                open(path, "wb").write(WATCHED[path])
        record(index=index, name=STEPS[index]["name"], error=error, changed=changed, result=text)


def next_step():
    index = max(RESULTS, default=-1) + 1
    return (index, STEPS[index]) if index < len(STEPS) else (index, None)


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def reply(self, body, kind="application/json"):
        body = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def events(self, events):
        body = "".join(f"event: {event['type']}\ndata: {json.dumps(event)}\n\n" for event in events)
        self.reply(body.encode(), "text/event-stream")

    def do_HEAD(self):
        self.reply(b"")

    def do_GET(self):
        record(get=self.path)
        self.reply({"data": [], "models": [], "object": "list"})

    def do_POST(self):
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        try:
            body = json.loads(raw or b"{}")
        except ValueError:
            body = {}
        path = self.path.split("?")[0]
        with LOCK:
            SEEN["requests"] += 1
            if path.endswith("/count_tokens"):
                self.reply({"input_tokens": 1000})
            elif path.endswith("/messages"):
                self.claude_turn(body)
            elif path.endswith("/responses"):
                self.codex_turn(body)
            else:
                record(post=self.path)
                self.reply({})

    # ---------------------------------------------------------------- Claude Code

    def claude_turn(self, body):
        tools = [tool["name"] for tool in body.get("tools", [])]
        main = "Bash" in tools and "Edit" in tools
        if main and not SEEN["tools"]:
            SEEN["tools"] = tools
            record(
                tools=tools,
                model=body.get("model"),
                system=body.get("system"),
                first=body["messages"][:2],
                bash=next((t for t in body["tools"] if t["name"] == "Bash"), None),
            )
        for message in body.get("messages", []):
            for block in message["content"] if isinstance(message["content"], list) else []:
                if main and block.get("type") == "tool_result":
                    found = re.match(r"toolu_step_(\d+)$", block["tool_use_id"])
                    if found:
                        came_back(int(found[1]), text_of(block.get("content")), bool(block.get("is_error")))
        block = {"type": "text", "text": "done"}
        if main:
            index, step = next_step()
            if step is not None:
                block = self.claude_block(index, step)
        stop = "tool_use" if block["type"] == "tool_use" else "end_turn"
        usage = {
            "input_tokens": 100,
            "output_tokens": 10,
            "cache_creation_input_tokens": 0,
            "cache_read_input_tokens": 0,
        }
        message = {
            "id": f"msg_{SEEN['requests']:06d}",
            "type": "message",
            "role": "assistant",
            "model": body.get("model", "scripted"),
            "content": [],
            "stop_reason": None,
            "stop_sequence": None,
            "usage": usage,
        }
        if not body.get("stream"):
            return self.reply({**message, "content": [block], "stop_reason": stop})
        if stop == "tool_use":
            start = {**block, "input": {}}
            delta = {"type": "input_json_delta", "partial_json": json.dumps(block["input"])}
        else:
            start, delta = {"type": "text", "text": ""}, {"type": "text_delta", "text": block["text"]}
        self.events(
            [
                {"type": "message_start", "message": message},
                {"type": "content_block_start", "index": 0, "content_block": start},
                {"type": "content_block_delta", "index": 0, "delta": delta},
                {"type": "content_block_stop", "index": 0},
                {"type": "message_delta", "delta": {"stop_reason": stop, "stop_sequence": None}, "usage": usage},
                {"type": "message_stop"},
            ]
        )

    def claude_block(self, index, step):
        if "bash" in step:
            name, given = "Bash", {"command": fill(step["bash"]), "description": step["name"]}
            if step.get("timeout"):
                given["timeout"] = step["timeout"]
            if step.get("background"):
                given["run_in_background"] = True
        elif "edit" in step:
            name, given = "Edit", dict(zip(("file_path", "old_string", "new_string"), step["edit"]))
        elif "write" in step:
            name, given = "Write", dict(zip(("file_path", "content"), step["write"]))
        elif "read" in step:
            name, given = "Read", {"file_path": step["read"]}
        else:
            return {"type": "text", "text": step["say"]}
        return {"type": "tool_use", "id": f"toolu_step_{index:04d}", "name": name, "input": given}

    # ---------------------------------------------------------------- Codex

    def codex_turn(self, body):
        if not SEEN["tools"]:
            SEEN["tools"] = [tool.get("name") or tool["type"] for tool in body.get("tools", [])]
            record(
                tools=SEEN["tools"],
                model=body.get("model"),
                instructions=body.get("instructions"),
                first=body.get("input"),
                full_tools=body.get("tools"),
            )
        for item in body.get("input", []):
            if item.get("type") in ("function_call_output", "custom_tool_call_output", "local_shell_call_output"):
                found = re.match(r"call_step_(\d+)(?:_poll_(\d+))?$", item["call_id"])
                if found and int(found[1]) not in RESULTS:
                    index, text = int(found[1]), text_of(item.get("output"))
                    PARTS.setdefault(index, {})[int(found[2] or 0)] = text
                    running = re.search(r"running with session ID (\d+)", text)
                    POLL[index] = int(running[1]) if running else None
        for index, session in list(POLL.items()):
            if session is None and index not in RESULTS:
                came_back(index, "".join(text for _, text in sorted(PARTS[index].items())), None)
        index, step = next_step()
        if step is not None and POLL.get(index) is not None:  # the command of this step goes on: wait for it
            turn = len(PARTS[index])
            item = {
                "type": "function_call",
                "name": "write_stdin",
                "call_id": f"call_step_{index:04d}_poll_{turn}",
                "id": f"fc_{index}_{turn}",
                "status": "completed",
                "arguments": json.dumps({"session_id": POLL[index], "chars": "", "yield_time_ms": 120000}),
            }
        elif step is None or "say" in step:
            text = "done" if step is None else step["say"]
            item = {
                "type": "message",
                "role": "assistant",
                "id": f"msg_{index}",
                "status": "completed",
                "content": [{"type": "output_text", "text": text, "annotations": []}],
            }
        else:
            item = self.codex_item(index, step)
        answer = {
            "id": f"resp_{SEEN['requests']}",
            "object": "response",
            "status": "completed",
            "output": [item],
            "model": body.get("model"),
            "usage": {
                "input_tokens": 100,
                "input_tokens_details": {"cached_tokens": 0},
                "output_tokens": 10,
                "output_tokens_details": {"reasoning_tokens": 0},
                "total_tokens": 110,
            },
        }
        if not body.get("stream"):
            return self.reply(answer)
        self.events(
            [
                {"type": "response.created", "response": {**answer, "status": "in_progress", "output": []}},
                {"type": "response.output_item.added", "output_index": 0, "item": item},
                {"type": "response.output_item.done", "output_index": 0, "item": item},
                {"type": "response.completed", "response": answer},
            ]
        )

    def codex_item(self, index, step):
        tools, call = SEEN["tools"], {"call_id": f"call_step_{index:04d}", "id": f"fc_{index}", "status": "completed"}
        if "patch" in step or "edit" in step:
            if "edit" in step:
                path, old, new = step["edit"]
                lines = [*(f"-{line}" for line in old.split("\n")), *(f"+{line}" for line in new.split("\n"))]
                patch = "\n".join(["*** Begin Patch", f"*** Update File: {path}", "@@", *lines, "*** End Patch"])
            else:
                patch = step["patch"]
            if "apply_patch" in tools:
                return {"type": "custom_tool_call", "name": "apply_patch", "input": patch, **call}
            command = f"apply_patch <<'PATCH'\n{patch}\nPATCH"
        elif "read" in step:
            command = f"head -n 20 {step['read']}"
        else:
            command = fill(step["bash"])
        if "exec_command" in tools:
            name, given = "exec_command", {"cmd": command, "yield_time_ms": step.get("timeout", 120000)}
        elif "shell_command" in tools:
            name, given = "shell_command", {"command": command, "timeout_ms": step.get("timeout", 120000)}
        else:
            name, given = "shell", {"command": ["bash", "-lc", command], "timeout_ms": step.get("timeout", 120000)}
        return {"type": "function_call", "name": name, "arguments": json.dumps(given), **call}


if __name__ == "__main__":
    server = ThreadingHTTPServer(("127.0.0.1", int(sys.argv[3]) if len(sys.argv) > 3 else 0), Handler)
    server.daemon_threads = True
    print(server.server_address[1], flush=True)
    server.serve_forever()
