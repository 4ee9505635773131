"""An endpoint of the chat protocol that does everything wrong, one fault after another: what P12 is tested against."""

import gzip
import hashlib
import json
import socketserver
import threading
import time
from collections import Counter

WELL = json.dumps({"analysis": "dull", "edits": [{"box": [0.1, 0.1, 0.6, 0.6], "aspect": "colour",
                                                  "prompt": "a sky in vivid colours", "strength": 1}]})


def completion(content) -> bytes:
    return json.dumps({"model": "test", "choices": [{"message": {"role": "assistant", "content": content}}]}).encode()


def http(status: int, body: bytes = b"{}", *headers: str, length: int | None = None) -> bytes:
    lines = [f"HTTP/1.1 {status} Said", f"Content-Length: {len(body) if length is None else length}", "Connection: close",
             *headers]
    return "\r\n".join(lines).encode() + b"\r\n\r\n" + body


def slowly(data: bytes):
    for i in range(len(data)):
        yield data[i:i + 1]
        time.sleep(0.1)


def refuses_format(status):
    def fault(request, key):
        return [http(status, b'{"detail": "Unsupported fields"}')] if b"response_format" in request else [
            http(200, completion(WELL))]
    return fault


def says(content):
    return lambda request, key: [http(200, completion(content))]


def sends(*parts):
    return lambda request, key: list(parts)


def date(seconds):
    return time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime(time.time() + seconds))


FAULTS = {
    "hangs up": sends(),
    "hangs": lambda request, key: None,
    "drips headers": lambda request, key: slowly(http(200, completion(WELL))),
    "drips the body": lambda request, key: [http(200, b"", length=900), *slowly(b"{" * 900)],
    "429, again at once": sends(http(429, b"{}", "Retry-After: 0")),
    "429, in a second": sends(http(429, b"{}", "Retry-After: 1")),
    "429, at a date": lambda request, key: [http(429, b"{}", f"Retry-After: {date(1)}")],
    "429, in a year": sends(http(429, b"{}", "Retry-After: 31536000")),
    "429, who knows": sends(http(429, b"{}", "Retry-After: soon")),
    "500": sends(http(500, b"Traceback (most recent call last)\n\x1b[31m")),
    "502": sends(http(502, b"<html><title>502 Bad Gateway</title></html>")),
    "503": sends(http(503, b"")),
    "401": sends(http(401, b'{"error": "no key"}')),
    "422 on response_format": refuses_format(422),
    "400 on response_format": refuses_format(400),
    "redirects": lambda request, key: [http(307, b"", "Location: http://evil.example/v1/chat/completions")],
    "50 MB": lambda request, key: [http(200, b"", length=50 << 20), *(b" " * (1 << 20) for _ in range(50))],
    "bad UTF-8": sends(http(200, b'{"choices": "\xff\xfe"}')),
    "compressed": sends(http(200, gzip.compress(completion(WELL)), "Content-Encoding: gzip")),
    "cut JSON": sends(http(200, completion(WELL)[:-20])),
    "cut body": sends(http(200, completion(WELL)[:-20], length=len(completion(WELL)))),
    "fenced JSON": says(f"```json\n{WELL}\n```"),
    "prose": says("What a lovely picture! I would not change a thing."),
    "wrong types": sends(http(200, b'{"choices": {"message": [1, 2]}}')),
    "inverted boxes": says(WELL.replace("[0.1, 0.1, 0.6, 0.6]", "[0.6, 0.6, 0.1, 0.1]")),
    "empty choices": sends(http(200, b'{"choices": []}')),
    "no content": says(None),
    "no HTTP": sends(b"SSH-2.0-OpenSSH_9.6\r\n"),
    "endless header": lambda request, key: [http(200, b"", "X-Long: " + "x" * 300_000)],
    "key in an error": lambda request, key: [http(500, b"you sent " + key)],
    "key in the reply": lambda request, key: [http(200, completion(WELL.replace("dull", key.decode())))],
}


class FaultServer(socketserver.ThreadingTCPServer):
    """Paths `/NAME/chat/completions` go through `schedules[NAME]`, then are answered well."""

    allow_reuse_address = daemon_threads = True
    request_queue_size = 64

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.schedules: dict[str, list[str]] = {}
        self.asked: dict[str, Counter] = {}  # how often each question came
        self.times: dict[str, list[float]] = {}  # when
        self.lock, self.pause = threading.Lock(), 0.0
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}/{name}"

    def __exit__(self, *_):
        self.shutdown()
        self.server_close()


class Handler(socketserver.StreamRequestHandler):
    def handle(self):
        server = self.server
        try:
            line = self.rfile.readline().decode("latin-1")
            headers = {}
            while (header := self.rfile.readline().strip()):
                name, _, value = header.partition(b":")
                headers[name.lower()] = value.strip()
            body = self.rfile.read(int(headers.get(b"content-length", 0)))
            name = line.split("/")[1]
            text = json.loads(body)["messages"][0]["content"][1]["text"]
            with server.lock:
                server.asked.setdefault(name, Counter())[hashlib.sha256(text.encode()).hexdigest()] += 1
                server.times.setdefault(name, []).append(time.monotonic())
                left = server.schedules.setdefault(name, [])
                fault = left.pop(0) if left else None
            time.sleep(server.pause)
            key = headers.get(b"authorization", b"").removeprefix(b"Bearer ")
            parts = FAULTS[fault](body, key) if fault else [http(200, completion(WELL))]
            if parts is None:
                self.connection.settimeout(30)
                self.rfile.read(1)  # until the caller leaves
                return
            for part in parts:
                self.connection.sendall(part)
        except (OSError, ValueError, IndexError):
            return  # the caller has left
