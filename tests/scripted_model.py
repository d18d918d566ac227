"""
A scripted model for Claude Code and Codex: a server that plays a list of tool calls, one a turn, and keeps what comes
back. Claude Code speaks POST /v1/messages, Codex POST /v1/responses, both with server-sent events for answers.

A step is a dict with a "name" and "bash": command (and "timeout" in ms), "edit": [path, old, new] or "read": path.
Instead of a list, `steps` may be a function that gets what came back so far and returns the next step, or None.
"""

import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TIMEOUT = 120_000


class ScriptedModel:
    """Serves at `url` until it is closed. Files in `watched` are put back after a step that changed them."""

    def __init__(self, steps, watched=()):
        self.steps = steps
        self.step = None  # the one whose result has not come back
        self.is_out = False  # of money: every request is refused
        self.watched = {path: path.read_bytes() for path in watched}
        self.came = {}  # name of a step -> its result, whether that is an error, which watched files it changed
        self.lock = threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (Handler,), {"model": self}))
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    @property
    def call(self):
        """The id of the call that is made next, or whose result has not come back."""
        return f"call_step_{len(self.came):04}"

    def came_back(self, result, error=False):
        """The result of the step is here. Puts the watched files back, and keeps the names of those that changed."""
        changed = []
        for path, before in self.watched.items():
            if not path.is_file() or path.read_bytes() != before:
                changed.append(path.name)
                path.write_bytes(before)
        self.came[self.step["name"]] = {"result": result, "error": error, "changed": changed}
        self.step = None

    def next_step(self):
        """The next step, or None."""
        if self.step is None and callable(self.steps):
            self.step = self.steps(self.came)
        elif self.step is None and len(self.came) < len(self.steps):
            self.step = self.steps[len(self.came)]
        return self.step


def text_of(content):
    """The text of a tool result, of either API."""
    if isinstance(content, dict):
        content = content.get("content") or content.get("output")
    return content if isinstance(content, str) else "".join(block.get("text", "") for block in content or [])


def claude_input(step):
    """The tool of Claude Code for a step, and its input."""
    if "edit" in step:
        return "Edit", dict(zip(("file_path", "old_string", "new_string"), step["edit"], strict=True))
    if "read" in step:
        return "Read", {"file_path": step["read"]}
    return "Bash", {"command": step["bash"], "description": step["name"], "timeout": step.get("timeout", TIMEOUT)}


def claude_turn(model, body):
    """Takes the results; returns a message with the next call, and its events. Without tools there is no call."""
    block = {"type": "text", "text": "done"}
    start, delta = block | {"text": ""}, {"type": "text_delta", "text": "done"}
    stop = {"stop_reason": "end_turn", "stop_sequence": None}

    # the result of the last call is somewhere in the conversation, which is sent whole each time
    if {"Bash", "Edit"} <= {tool["name"] for tool in body.get("tools", [])}:
        contents = [message["content"] for message in body["messages"] if isinstance(message["content"], list)]
        for part in sum(contents, []):
            if part["type"] == "tool_result" and part["tool_use_id"] == model.call:
                model.came_back(text_of(part.get("content")), bool(part.get("is_error")))
        if step := model.next_step():
            name, given = claude_input(step)
            block = {"type": "tool_use", "id": model.call, "name": name, "input": given}
            start, delta = block | {"input": {}}, {"type": "input_json_delta", "partial_json": json.dumps(given)}
            stop["stop_reason"] = "tool_use"

    # the same turn as a message, and as the events of a stream
    usage = {"input_tokens": 100, "output_tokens": 10}
    message = {"id": "msg", "type": "message", "role": "assistant", "model": body.get("model"), "content": [], **stop}
    events = [
        {"type": "message_start", "message": message | {"usage": usage, "stop_reason": None}},
        {"type": "content_block_start", "index": 0, "content_block": start},
        {"type": "content_block_delta", "index": 0, "delta": delta},
        {"type": "content_block_stop", "index": 0},
        {"type": "message_delta", "delta": stop, "usage": usage},
        {"type": "message_stop"},
    ]
    return message | {"usage": usage, "content": [block]}, events


def codex_turn(model, body):
    """As claude_turn. A command that takes long comes back while it runs, in pieces that are asked for one by one."""
    # pieces of the result so far; the last one says whether the command still runs
    pieces = [
        text_of(item["output"])
        for item in body["input"]
        if item.get("call_id", "").startswith(model.call) and "output" in item
    ]
    running = re.search(r"running with session ID (\d+)", pieces[-1]) if pieces else None
    if pieces and not running:
        model.came_back("".join(pieces))
        pieces = []

    # a call, of this step or for the next piece; at the end a text
    step = model.next_step()
    call = {"id": f"item_{model.call}_{len(pieces)}", "call_id": f"{model.call}_{len(pieces)}", "status": "completed"}
    if step is None:
        text = {"type": "output_text", "text": "done", "annotations": []}
        item = {"type": "message", "role": "assistant", "content": [text], **call}
    elif running:
        given = {"session_id": int(running[1]), "chars": "", "yield_time_ms": TIMEOUT}
        item = {"type": "function_call", "name": "write_stdin", "arguments": json.dumps(given), **call}
    else:
        # Codex has a shell alone: it reads and edits with commands
        command = step.get("bash")
        if "read" in step:
            command = f"head -n 20 {step['read']}"
        elif "edit" in step:
            path, old, new = step["edit"]
            lines = [*(f"-{line}" for line in old.split("\n")), *(f"+{line}" for line in new.split("\n"))]
            patch = ["*** Begin Patch", f"*** Update File: {path}", "@@", *lines, "*** End Patch"]
            command = "\n".join(["apply_patch <<'PATCH'", *patch, "PATCH"])
        given = {"cmd": command, "yield_time_ms": step.get("timeout", TIMEOUT)}
        item = {"type": "function_call", "name": "exec_command", "arguments": json.dumps(given), **call}

    # the same turn as a response, and as the events of a stream
    usage = {"input_tokens": 100, "output_tokens": 10, "total_tokens": 110}
    answer = {"id": "resp", "object": "response", "status": "completed", "output": [item], "usage": usage}
    events = [
        {"type": "response.created", "response": answer | {"status": "in_progress", "output": []}},
        {"type": "response.output_item.added", "output_index": 0, "item": item},
        {"type": "response.output_item.done", "output_index": 0, "item": item},
        {"type": "response.completed", "response": answer},
    ]
    return answer, events


TURNS = {"messages": claude_turn, "responses": codex_turn}  # by the end of the path


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.reply(json.dumps({"data": [], "models": []}))

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)) or b"{}")
        # besides turns, both clients ask how many tokens a text has
        turn = TURNS.get(self.path.split("?")[0].rpartition("/")[2])
        if turn is None:
            return self.reply(json.dumps({"input_tokens": 1000}))

        # without money both APIs refuse every turn
        if self.model.is_out:
            error = {"type": "invalid_request_error", "message": "Your credit balance is too low"}
            return self.reply(json.dumps({"type": "error", "error": error}), status=400)
        with self.model.lock:
            answer, events = turn(self.model, body)
        if not body.get("stream"):
            return self.reply(json.dumps(answer))
        lines = [f"event: {event['type']}\ndata: {json.dumps(event)}\n\n" for event in events]
        self.reply("".join(lines), "text/event-stream")

    def reply(self, text, kind="application/json", status=200):
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *arguments):
        pass
