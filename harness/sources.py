"""
Text of the user's own, or the Python source that is on every machine: which files, in which order, in which groups.

A source is a stream of batches. A batch is a list of documents (str) that stay on one side of the split.
"""

import copy
import hashlib
import importlib.util
import os
import sysconfig
from collections import Counter
from pathlib import Path

from harness.common import printable
from harness.documents import Skipped, cut, file_kind, jsonl_batches, parquet_batches, read_text

TEXT_SUFFIXES = (".txt", ".md", ".py", ".rst", ".jsonl", ".parquet")  # the last two hold many documents
FEW_GROUPS = 10  # with fewer groups of files than this, each block of text is a batch of its own
LFS_POINTER = b"version https://git-lfs.github.com/spec/v1"
LFS_POINTER_BYTES = 1024  # a pointer file is smaller, says its specification
DEFAULT_TEXT = {
    "packages": ("torch", "sympy", "numpy", "networkx"),  # and the standard library
    "ignored": {"test", "tests", "idle_test", "site-packages", "dist-packages"},
}


# --------------------------------------
# Search


class Search:
    """Looks for text files under folders. Remembers the size and mtime of each, and what was left out."""

    def __init__(self, is_default):
        self.is_default = is_default
        self.groups = {}  # name: paths
        self.states = {}  # path: size in bytes, time of change in nanoseconds
        self.skipped = Skipped()
        self.entered = set()  # folders, by device and inode
        self.links = []  # to folders: root, path

    def walk(self, prefix, root, link=None):
        """Add what lies under the folder `root`, or under a link in it. A group's name has the prefix."""
        for folder, subfolders, names in os.walk(link or root, onerror=self.note_folder):
            # A link may lead to a folder that was found before, or back to one that it is in.
            status = os.stat(folder)
            identity = (status.st_dev, status.st_ino)
            if link and identity in self.entered:
                subfolders.clear()
                continue
            self.entered.add(identity)

            # os.walk goes on with the subfolders that are left in this list, links excepted.
            subfolders[:] = sorted(name for name in subfolders if self.enters(name))
            paths = [Path(folder, name) for name in subfolders]
            self.links += [(root, path) for path in paths if os.path.islink(path)]

            # A group is what lies in one subfolder of the root, or a lone file beside those.
            for name in sorted(names):
                path = Path(folder, name)
                if self.takes(path):
                    self.add(prefix + path.relative_to(root).parts[0], path)

    def enters(self, name):
        if self.is_default and name in DEFAULT_TEXT["ignored"]:
            return False
        return not name.startswith(".") and name != "__pycache__"

    def takes(self, path):
        if path.name.startswith("."):
            return False
        if self.is_default:
            return path.suffix == ".py"
        suffix, compression = file_kind(path)
        if suffix == ".parquet":
            return compression is None
        return suffix in TEXT_SUFFIXES

    def note_folder(self, error):
        self.skipped.add("folders that cannot be read", error.filename)

    def add(self, group, path):
        """Add a file to a group, if it can be read and its content is here."""
        # A pipe is no text: to open it may take forever.
        if not os.path.isfile(path):
            self.skipped.add("files that cannot be read", path)
            return
        try:
            with open(path, "rb") as file:
                status = os.fstat(file.fileno())
                start = file.read(len(LFS_POINTER))
        except OSError:
            self.skipped.add("files that cannot be read", path)
            return
        if start == LFS_POINTER and status.st_size < LFS_POINTER_BYTES:
            self.skipped.add('files not fetched yet (run "git lfs pull")', path)
            return
        self.groups.setdefault(group, []).append(path)
        self.states[path] = file_state(status)


def file_state(status):
    """Size in bytes and time of change in nanoseconds: one of them changes when the file does."""
    return status.st_size, status.st_mtime_ns


def search_paths(paths):
    """A Search that has looked under the user's paths. Raises SystemExit, in one line, if nothing was found."""
    search = Search(is_default=False)
    for root in map(Path, paths):
        if not os.path.exists(root):
            raise SystemExit(f"--text {printable(root)}: no such file or folder")
        if os.path.isdir(root):
            search.walk("", root)
        else:
            search.add(root.name, root)

    # links last, so that a folder wins over links to it; walk() may append to them
    for root, path in search.links:
        search.walk("", root, path)

    # What was left out may be all that there is.
    if not search.groups:
        listed = printable(" ".join(map(str, paths)))
        reasons = [f"no {' '.join(TEXT_SUFFIXES)} file in there", *search.skipped.lines()]
        raise SystemExit(f"--text {listed}: {'; '.join(reasons)}")
    return search


def search_default():
    """A Search that has found the Python source of the standard library and of some packages, without their tests."""
    search = Search(is_default=True)
    for package in DEFAULT_TEXT["packages"]:
        root = Path(importlib.util.find_spec(package).origin).parent
        search.walk(f"{package}/", root)
    root = Path(sysconfig.get_path("stdlib"))
    search.walk("", root)
    return search


# --------------------------------------
# Batches


class LocalText:
    """
    Text files under the user's `paths` (folders or files), or the default text without paths. They are found at once.

    Groups, which are top-level folders and lone files, come in the order of a hash of their name: validation takes the
    first ones. Raises SystemExit, in one line, for bad paths.
    """

    def __init__(self, paths):
        search = search_paths(paths) if paths else search_default()

        # fsencode takes names that are not UTF-8, too.
        def name_hash(name):
            return hashlib.sha256(os.fsencode(name)).digest()

        self.groups = {name: search.groups[name] for name in sorted(search.groups, key=name_hash)}
        self._states = search.states
        self._not_found = search.skipped
        self.counts = Counter()
        self.skipped = copy.deepcopy(search.skipped)

    def batches(self):
        """
        A new pass over the text: batches, lists of str. `counts` and `skipped` are those of the last pass begun.

        A batch is a group, so that validation text is not a near-copy of training text, or a block of text if there
        are few groups. Records of .jsonl and .parquet files make batches of their own. Exact duplicates are dropped.
        Raises SystemExit, in one line, for a file that is damaged.
        """
        self.counts = Counter()
        self.skipped = copy.deepcopy(self._not_found)
        return self._read(Duplicates(self.counts), self.skipped)

    def _read(self, duplicates, skipped):
        has_few_groups = len(self.groups) < FEW_GROUPS
        for paths in self.groups.values():
            group = []
            for path in paths:
                suffix, _ = file_kind(path)
                if suffix == ".jsonl":
                    yield from map(duplicates.drop, jsonl_batches(path, skipped))
                elif suffix == ".parquet":
                    yield from map(duplicates.drop, parquet_batches(path, skipped))
                elif has_few_groups:
                    for block in cut(read_text(path, skipped)):
                        yield duplicates.drop([block])
                else:
                    group += duplicates.drop([read_text(path, skipped)])
            if group:
                yield group

    def signature(self):
        """How all files looked when they were found: a list of (group, absolute path, size in bytes, mtime in ns)."""
        files = [(group, path) for group, paths in self.groups.items() for path in paths]
        return [(group, str(path.absolute()), *self._states[path]) for group, path in files]

    def refuse_changes(self):
        """
        Raises SystemExit, in one line, if a file has changed since it was found.

        The text is read several times, and its batches are counted: a file that grows meanwhile would move scored
        text into training.
        """
        for path, state in self._states.items():
            try:
                is_same = file_state(path.stat()) == state
            except OSError:
                is_same = False
            if not is_same:
                advice = "run this again when nothing writes to it"
                raise SystemExit(f"{printable(path)}: changed while it was read; {advice}")


class Duplicates:
    """Drops documents that were there before, and empty ones; counts the others."""

    def __init__(self, counts):
        self.counts = counts
        self.digests = set()

    def drop(self, texts):
        kept = []
        for text in filter(None, texts):
            digest = hashlib.sha256(text.encode()).digest()[:16]
            if digest in self.digests:
                self.counts["duplicates"] += 1
            else:
                self.counts["documents"] += 1
                self.digests.add(digest)
                kept.append(text)
        return kept
