"""Tests of app.py: a real uvicorn, and an upstream that does what each test says."""

import contextlib
import gzip
import http.client
import importlib
import json
import os
import pathlib
import queue
import re
import runpy
import socket
import socketserver
import struct
import subprocess
import sys
import tempfile
import threading
import time
import unittest
from unittest import mock
from urllib.parse import parse_qsl, urlsplit

import httpx
import uvicorn

# The tests set what the app and its libraries read, whatever the shell has set
os.environ.update(UPSTREAM="", LATENCY="0.02", PYTHONUNBUFFERED="1")
ENVIRON = {k: v for k, v in os.environ.items() if not k.lower().endswith("_proxy")}
app = importlib.import_module("app")

HERE = pathlib.Path(__file__).parent
UVICORN = "-m", "uvicorn", "app:application", "--port", "0"
RUNSERVER = "app.py", "runserver", "--noreload", "0"  # WSGI
VIEWS = "/", "/magic"
WAIT = 20  # seconds, for what comes at once unless a test fails
RESULT = b'{"result": [{"test": "1"}, {"test": "2"}, {"test": "3"}, {"test": "4"}]}'


class Upstream(socketserver.ThreadingTCPServer):
    """Answers each connection with `reply`: bytes, or a function of the Exchange."""

    daemon_threads, request_queue_size = True, 64


class Exchange(socketserver.BaseRequestHandler):
    def handle(self):
        self.request.settimeout(WAIT)  # an app that waits for ever is let go, to fail
        head = b""
        while b"\r\n\r\n" not in head:
            head += self.request.recv(65536) or b"- - \r\n\r\n"
        self.target = head.split()[1].decode()
        self.query = dict(parse_qsl(urlsplit(self.target).query))
        self.server.targets.append(self.target)
        reply = self.server.reply
        with contextlib.suppress(OSError):  # a client that left, or was left
            self.request.sendall(reply(self) if callable(reply) else reply)


def response(body, status="200 OK", header="Connection: close"):
    head = f"HTTP/1.1 {status}\r\n{header}\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def redirect(location):
    return response(b"", "302 Found", f"Connection: close\r\nLocation: {location}")


def echo(exchange):
    """Answer as httpbin's /get does."""
    return response(json.dumps({"args": exchange.query}).encode())


def stall(exchange, start=b""):
    """Answer no more than a start, until the client goes."""
    exchange.request.sendall(start)
    return exchange.request.recv(1)


def reset(exchange, start=b""):
    """Answer no more than a start, and reset the connection (RST)."""
    exchange.request.sendall(start)
    linger = struct.pack("ii", 1, 0)
    exchange.request.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    exchange.request.close()
    return b""


def loop(exchange):
    """Redirect the first of the four for ever."""
    return redirect("?test=1") if exchange.query["test"] == "1" else stall(exchange)


def closed_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


def has_ipv6():
    with contextlib.suppress(OSError), socket.socket(socket.AF_INET6) as server:
        return server.bind(("::1", 0)) is None


def get(port, path, host="127.0.0.1", headers=None):
    """Return the status, the body and the headers of a GET."""
    connection = http.client.HTTPConnection(host, port, timeout=60)
    with contextlib.closing(connection):
        connection.request("GET", path, headers=headers or {})
        answer = connection.getresponse()
        return answer.status, answer.read(), answer.headers


def port_of(child):
    """Read the terminal of a server until it says where it serves; return the port."""
    for line in child.stdout:
        if said := re.search(r" (?:at|on) http://(.+):(\d+)", line):
            address = said[1].strip("[]"), int(said[2])
            while child.poll() is None:
                time.sleep(0.02)
                # Workers listen later than it is said
                with contextlib.suppress(ConnectionRefusedError):
                    socket.create_connection(address).close()
                    return address[1]
    raise AssertionError("the server has ended")


def setUpModule():
    global PORT
    options = {"port": 0, "log_config": None, "ws": "none"}
    server = uvicorn.Server(uvicorn.Config(app.application, **options))
    thread = threading.Thread(target=server.run)
    thread.start()
    unittest.addModuleCleanup(thread.join)
    unittest.addModuleCleanup(setattr, server, "should_exit", True)
    while not server.started:
        time.sleep(0.01)
    PORT = server.servers[0].sockets[0].getsockname()[1]


class Case(unittest.TestCase):
    def patch(self, **values):
        patcher = mock.patch.multiple(app, **values)
        patcher.start()
        self.addCleanup(patcher.stop)

    def upstream(self, reply):
        """Start an Upstream, and make it the app's."""
        server = Upstream(("127.0.0.1", 0), Exchange)
        server.reply, server.targets, port = reply, [], server.server_address[1]
        server.address = f"127.0.0.1:{port}"
        threading.Thread(target=server.serve_forever, args=[0.01]).start()
        self.addCleanup(server.server_close)
        self.addCleanup(server.shutdown)
        self.patch(UPSTREAM=httpx.URL(f"http://user:secret@{server.address}/get"))
        return server

    def check(self, port, paths=VIEWS, **options):
        for path in paths:
            self.assertEqual(get(port, path, **options)[:2], (200, RESULT), path)

    def start(self, *arguments, **environ):
        """Start Python in a process that ends with the test; its terminal is a pipe."""
        child = subprocess.Popen(
            [sys.executable, *arguments],
            env={**ENVIRON, **environ},
            cwd=HERE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.addCleanup(child.communicate)
        self.addCleanup(child.terminate)
        return child


class TestViews(Case):
    def test_both_views_answer_the_same_bytes(self):
        self.check(PORT)

    def test_index_never_has_two_requests_in_flight(self):
        alone = threading.Lock()

        def reply(exchange):
            if not alone.acquire(blocking=False):
                return response(b"", "500 Two in flight")
            time.sleep(0.02)
            alone.release()
            return echo(exchange)

        self.upstream(reply)
        self.check(PORT, ["/"])

    def answer_only_four_together(self):
        together = threading.Barrier(4, timeout=WAIT)

        def reply(exchange):
            with contextlib.suppress(threading.BrokenBarrierError):
                return together.wait() >= 0 and echo(exchange)
            return response(b"", "500 Fewer than four in flight")

        return self.upstream(reply)

    def test_magic_has_all_four_in_flight_together(self):
        self.answer_only_four_together()
        self.check(PORT, ["/magic"])

    def test_the_view_of_the_readme_has_all_four_in_flight_together(self):
        readme = (HERE / "README.md").read_text(encoding="utf-8")
        (view,) = re.findall(r"```python\n([^`]*def threads\([^`]*)```", readme)
        source = (HERE / "app.py").read_text(encoding="utf-8")
        before, application, after = source.partition("\napplication = ")
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        pasted = pathlib.Path(folder.name, "app.py")
        pasted.write_text(before + "\n" + view + application + after, encoding="utf-8")
        upstream = f"http://{self.answer_only_four_together().address}"
        child = self.start(*UVICORN, "--app-dir", folder.name, UPSTREAM=upstream)
        self.check(port_of(child), ["/threads"])

    def test_the_order_holds_when_the_upstream_answers_in_reverse(self):
        answered = [threading.Event() for _ in range(6)]
        answered[5].set()

        def reply(exchange):
            n = int(exchange.query["test"])
            answered[n + 1].wait(WAIT)
            exchange.request.sendall(echo(exchange))
            answered[n].set()
            return b""

        self.upstream(reply)
        self.check(PORT, ["/magic"])

    def test_server_timing_has_the_milliseconds_of_each_fetch_in_order(self):
        def reply(exchange):
            time.sleep(0.02 * int(exchange.query["test"]))
            return echo(exchange)

        self.upstream(reply)
        for path, total in ("/", sum), ("/magic", max):
            start = time.perf_counter()
            timing = get(PORT, path)[2]["Server-Timing"]
            took = (time.perf_counter() - start) * 1000
            pattern = ", ".join(rf"get{n};dur=(\d+\.\d)" for n in (1, 2, 3, 4))
            times = [float(ms) for ms in re.fullmatch(pattern, timing).groups()]
            for n, ms in enumerate(times, 1):
                self.assertGreaterEqual(ms, 20 * n, timing)
            self.assertLessEqual(total(times), took, path)

    def test_the_query_of_the_upstream_is_kept_and_redirects_are_followed(self):
        def reply(exchange):
            if exchange.target.startswith("/get"):
                return redirect(exchange.target.replace("get", "moved"))
            return echo(exchange)

        server = self.upstream(reply)
        self.patch(UPSTREAM=app.UPSTREAM.copy_with(query=b"key=a%20b&test=0"))
        for path in VIEWS:
            args = [{"key": "a b", "test": str(n)} for n in (1, 2, 3, 4)]
            self.assertEqual(json.loads(get(PORT, path)[1]), {"result": args})
        moved = [target for target in server.targets if "moved" in target]
        self.assertEqual([target.count("test=0&") for target in moved], [1] * 8)

    def test_the_stand_in_answers_with_its_query_and_blocks_nobody(self):
        self.patch(LATENCY=WAIT)
        with socket.create_connection(("127.0.0.1", PORT)) as waiting:
            waiting.sendall(b"GET /get HTTP/1.1\r\nHost: test\r\n\r\n")
            waiting.settimeout(0.2)
            self.assertRaises(TimeoutError, waiting.recv, 1)
            self.patch(LATENCY=0)
            args = b'{"args": {"a": "1", "b": "x y"}}'
            self.assertEqual(get(PORT, "/get?a=1&b=x+y")[:2], (200, args))
            self.assertRaises(TimeoutError, waiting.recv, 1)


ARGS = b'{"args": {"test": "1"}}'
HALF, GZIP = response(ARGS)[:-5], "Content-Encoding: gzip"
LATE, BROKEN = (504, "no answer within 0.1 s"), (502, "no complete answer")
BAD = 502, "status 200, no httpbin JSON"
NOT_HTTPBIN = [
    *b'|<html>|[]|null|1|"args"|{}|{"args": null}|{"args": []}'.split(b"|"),
    *b'{"args": [["a", 1]]}|{"args": "a"}|{"args": 1|{"args": {"\xff": 1}}'.split(b"|"),
    *(b'{"args": ' + b'{"":' * 100_000, b"\xff" * 1_000),
]
FAILURES = {
    "hangs": (stall, LATE),
    "hangs half way": (lambda exchange: stall(exchange, HALF), LATE),
    "stops half way": (HALF, BROKEN),
    "answers nothing": (b"", BROKEN),
    "answers no HTTP": (b"220 smtp\r\n\r\n", BROKEN),
    "resets": (reset, BROKEN),
    "resets half way": (lambda exchange: reset(exchange, HALF), BROKEN),
    "bad gzip": (response(ARGS, "200 OK", GZIP), BROKEN),
    "half a gzip": (response(gzip.compress(ARGS)[:15], "200 OK", GZIP), BAD),
    "redirects for ever": (loop, BROKEN),
    "redirects to a closed port": (redirect(f"//127.0.0.1:{closed_port()}"), BROKEN),
    "redirects to no host": (redirect("http://"), BROKEN),
    "redirects to an unknown host": (redirect("//unknown.invalid"), BROKEN),
    "redirects to another scheme": (redirect("mailto:x"), BROKEN),
    **{  # 302: to nowhere
        status: (response(ARGS, status), (502, BAD[1].replace("200", status[:3])))
        for status in ("302 Found", "304 Not Modified", "404 Not Found", "500 Oops")
    },
    **{body[:30]: (response(body), BAD) for body in NOT_HTTPBIN},
}


class TestFailures(Case):
    def fail_with(self, path, status, kind, url):
        """GET `path`; the client is told `kind`, the terminal the rest in one line."""
        with self.assertLogs("app") as logs:
            answer = get(PORT, path)
        self.assertEqual((answer[0], json.loads(answer[1])["error"]), (status, kind))
        (line,) = logs.output
        self.assertRegex(line, rf"^ERROR:app:{status} for {path}: \w+\(.* from {url}")
        self.assertNotRegex(line, "secret|.{800}")

    def test_a_failure_is_502_or_504_in_both_views_and_the_next_request_works(self):
        server = self.upstream(echo)
        for name, (reply, (status, kind)) in FAILURES.items():
            url = "" if "redirects" in str(name) else f"http://{server.address}/get"
            for path in VIEWS:
                with self.subTest(name, path=path):
                    server.reply = reply
                    timeout = 0.1 if status == 504 else 30
                    with mock.patch.object(app, "TIMEOUT", timeout):
                        self.fail_with(path, status, f"upstream: {kind}", url)
            server.reply = echo
            self.check(PORT, ["/magic"])
        self.check(PORT)

    def test_an_upstream_that_cannot_be_reached_is_502(self):
        for host in f"127.0.0.1:{closed_port()}", "unknown.invalid":
            self.patch(UPSTREAM=httpx.URL(f"http://user:secret@{host}/get"))
            for path in VIEWS:
                with self.subTest(host, path=path):
                    url = rf"http://{host}/get\?test=\d"
                    self.fail_with(path, 502, "upstream: no complete answer", url)

    def wait_for_four(self, then):
        """Let the upstream do `then` with four together; return what it reads after."""
        self.patch(TIMEOUT=60)
        together, after = threading.Barrier(4, timeout=WAIT), queue.Queue()

        def reply(exchange):
            together.wait()
            then(exchange)
            after.put(stall(exchange))
            return b""

        self.upstream(reply)
        return after

    def test_one_broken_fetch_fails_magic_without_waiting_for_the_others(self):
        after = self.wait_for_four(lambda e: e.query["test"] == "3" and reset(e))
        self.fail_with("/magic", 502, "upstream: no complete answer", r".*test=3")
        self.assertEqual([after.get(timeout=WAIT) for _ in range(3)], [b""] * 3)

    def test_a_client_that_leaves_takes_the_fetches_of_magic_with_it(self):
        arrived = threading.Barrier(5, timeout=WAIT)
        after = self.wait_for_four(lambda exchange: arrived.wait())
        with socket.create_connection(("127.0.0.1", PORT)) as client:
            client.sendall(b"GET /magic HTTP/1.1\r\nHost: test\r\n\r\n")
            arrived.wait()
            self.assertTrue(after.empty())
        self.assertEqual([after.get(timeout=WAIT) for _ in range(4)], [b""] * 4)

    def test_a_broken_view_is_a_plain_500_with_its_traceback_in_the_terminal(self):
        child = self.start(
            "-c",
            "import app, uvicorn\n"
            "faults = iter([lambda: 1 / 0] * 2 + [lambda: None] * 2)\n"
            "app.answer = lambda responses: next(faults)()\n"
            "uvicorn.run(app.application, port=0)",
        )
        port = port_of(child)
        for path in VIEWS * 2:
            error = b'{"error": "Internal Server Error"}'
            self.assertEqual(get(port, path)[:2], (500, error))
        child.terminate()
        terminal = child.stdout.read()
        for reason in "ZeroDivisionError: division", "It returned None instead.":
            self.assertEqual(terminal.count(reason), 2, terminal)

    def test_the_terminal_has_a_line_for_a_failure_and_none_while_all_is_well(self):
        server = self.upstream(echo)
        child = self.start(*UVICORN, UPSTREAM=f"http://{server.address}")
        port = port_of(child)
        self.check(port)
        server.reply = b""
        self.assertEqual([get(port, path)[0] for path in VIEWS], [502, 502])
        child.terminate()
        ours = [line for line in child.stdout if not line.startswith("INFO: ")]
        starts = [line.partition(":")[0] for line in ours]
        self.assertEqual(starts, ["502 for /", "502 for /magic"])


class TestServing(Case):
    def test_forged_headers_reach_no_other_address(self):
        trap = self.upstream(echo)
        self.patch(UPSTREAM=None)
        names = "Host", "X-Forwarded-Host", "X-Forwarded-Server", "X-Forwarded-For"
        for address in trap.address, "unknown.invalid:80":
            forged = {
                **dict.fromkeys(names, address),
                "X-Forwarded-Port": address.split(":")[1],
                "X-Forwarded-Proto": "https",
                "Forwarded": f"host={address};proto=https",
            }
            with self.subTest(address):
                self.check(PORT, headers=forged)
        self.assertEqual(trap.targets, [])

    def test_the_app_finds_itself_however_it_is_served_and_past_any_proxy(self):
        trap = self.upstream(echo)
        proxies = dict.fromkeys(["HTTP_PROXY", "https_proxy"], f"http://{trap.address}")
        proxies |= {"ALL_PROXY": f"socks5://{trap.address}"}
        options = "--workers", "2", "--root-path", "/demo", "--host", "0.0.0.0"
        for child, host in [
            (self.start(*UVICORN, *options, **proxies), "127.0.0.1"),
            (self.start(*RUNSERVER, **proxies), "127.0.0.1"),
            (self.start(*UVICORN, "--host", "::1", **proxies), "::1"),
        ]:
            with self.subTest(child.args):
                if host == "::1" and not has_ipv6():
                    self.skipTest("this machine has no IPv6")
                self.check(port_of(child), host=host)
        self.assertEqual(trap.targets, [])

    def test_a_proxy_is_honoured_for_a_live_upstream(self):
        proxy = self.upstream(echo)
        url = "http://httpbin.invalid/get"
        environ = {"UPSTREAM": url, "HTTP_PROXY": f"http://{proxy.address}"}
        self.check(port_of(self.start(*UVICORN, **environ)))
        expected = [f"{url}?test={n}" for n in (1, 1, 2, 2, 3, 3, 4, 4)]
        self.assertEqual(sorted(proxy.targets), expected)

    def test_a_bad_environment_variable_stops_the_start_and_is_named(self):
        bad = {
            "LATENCY must be a number of seconds": "soon||nan|-1",
            "UPSTREAM must be an http or https URL with a host": (
                "httpbin.org/get|ftp://h/get|http:///get|http://:80/get|http://[::1"
            ),
        }
        for message, values in bad.items():
            name, values = message.split()[0], values.split("|")
            child = self.start(*UVICORN, **{name: values[0]})
            for value in values:
                with (
                    self.subTest(name, value=value),
                    mock.patch.dict(os.environ, {name: value}),
                    self.assertRaises(SystemExit) as end,
                ):
                    runpy.run_path(HERE / "app.py")
                self.assertEqual(str(end.exception), message)
            self.assertEqual((child.stdout.read(), child.wait()), (f"{message}\n", 1))

    def test_the_metadata_of_the_script_is_requirements_txt(self):
        source = (HERE / "app.py").read_text(encoding="utf-8")
        listed = re.search(r"\n# dependencies = \[([^#]*#[^#]*)\]\n", source)
        lines = (HERE / "requirements.txt").read_text(encoding="utf-8").splitlines()
        required = [line.partition("#")[0].strip() for line in lines]
        self.assertEqual(re.findall(r'"(.+?)"', listed[1]), required)


if __name__ == "__main__":
    unittest.main()
