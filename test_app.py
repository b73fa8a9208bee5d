"""Tests of app.py: a real uvicorn, and an upstream that does what each test says."""

import asyncio
import contextlib
import gzip
import http.client
import http.server
import importlib
import json
import os
import pathlib
import queue
import re
import resource
import signal
import socket
import socketserver
import ssl
import struct
import subprocess
import sys
import threading
import time
import unittest
from unittest import mock
from urllib.parse import parse_qsl, urlencode, urlsplit

from django.test import override_settings
from django.urls import clear_url_caches

READ = r"(?i)UPSTREAM|LATENCY|\w+_proxy|SSL_CERT_\w+|(REQUESTS|CURL)_CA_BUNDLE"
ENVIRON = {k: v for k, v in os.environ.items() if not re.fullmatch(READ, k)}
mock.patch.dict(os.environ, ENVIRON, clear=True).start()
app = importlib.import_module("app")
DEFAULTS = app.LATENCY, app.TIMEOUT
app.LATENCY = 0.02

HERE = pathlib.Path(__file__).parent
CERTIFICATE = HERE / ".ci" / "127.0.0.1.pem"  # with its key; nobody trusts it
PORT = urlsplit(app.urls[0]).port  # the stand-in is a uvicorn that serves the views too
VIEWS = "/", "/magic"
HARD = resource.getrlimit(resource.RLIMIT_NOFILE)[1]  # open files
WAIT = 20  # seconds, for what comes at once unless a test fails
RESULT = b'{"result": [{"test": "1"}, {"test": "2"}, {"test": "3"}, {"test": "4"}]}'
LIMITED = """
import resource, sys
resource.setrlimit(resource.RLIMIT_NOFILE, eval(sys.argv[1]))
import app, uvicorn
print(app.LATENCY, *resource.getrlimit(resource.RLIMIT_NOFILE), app.settings.SECRET_KEY)
uvicorn.main(["app:application", "--port", "0"])
"""


class Exchange(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    timeout = WAIT  # an app that waits for ever is let go, to fail

    def do_GET(self):
        self.query = dict(parse_qsl(urlsplit(self.path).query))
        self.server.exchanges.append(self)
        reply = self.server.reply
        self.close_connection = reply is not echo
        with contextlib.suppress(OSError):  # a client that left, or was left
            self.wfile.write(reply(self) if callable(reply) else reply)

    def log_message(self, *args): ...


def serve(reply, scheme="http"):
    """Start an upstream that answers with bytes, or a function of the Exchange."""
    server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Exchange)
    server.daemon_threads, server.reply, server.exchanges = True, reply, []
    server.address = f"127.0.0.1:{server.server_address[1]}"
    server.url = f"{scheme}://user:secret@{server.address}/get"
    if scheme == "https":
        tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        tls.load_cert_chain(CERTIFICATE)
        server.socket = tls.wrap_socket(server.socket, server_side=True)
    threading.Thread(target=server.serve_forever, args=[0.01]).start()
    unittest.addModuleCleanup(server.server_close)
    unittest.addModuleCleanup(server.shutdown)
    return server


def response(body, status="200 OK", header="Connection: close"):
    head = f"HTTP/1.1 {status}\r\n{header}\r\nContent-Length: {len(body)}\r\n\r\n"
    return head.encode() + body


def redirect(location):
    return response(b"", "302 Found", f"Connection: close\r\nLocation: {location}")


def echo(exchange):
    """Answer as httpbin's /get does; as the whole reply, keep the connection open."""
    body = json.dumps({"args": exchange.query}).encode()
    connection = "close" if exchange.close_connection else "keep-alive"
    return response(body, header=f"Set-Cookie: a=b\r\nConnection: {connection}")


def stall(exchange, start=b""):
    """Answer no more than a start, until the client goes, or has waited 4 s."""
    exchange.connection.sendall(start)
    exchange.connection.settimeout(4)
    with contextlib.suppress(TimeoutError):
        return exchange.connection.recv(1)
    return response(ARGS)[len(start) :]


def reset(exchange, start=b""):
    """Answer no more than a start, and reset the connection (RST)."""
    exchange.connection.sendall(start)
    linger = struct.pack("ii", 1, 0)
    exchange.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
    socket.close(exchange.connection.detach())
    return b""


ARGS = b'{"args": {"test": "1"}}'
HALF, GZIP = response(ARGS)[:-5], "Connection: close\r\nContent-Encoding: gzip"
ENDED, BAD = "RemoteDisconnected|RemoteProtocolError", "NotHttpbin.'status 200'"
NOT_HTTPBIN = [
    *b'|<html>|[]|null|1|"args"|{}|{"args": null}|{"args": []}'.split(b"|"),
    *b'{"args": [["a", 1]]}|{"args": "a"}|{"args": 1|{"args": {"\xff": 1}}'.split(b"|"),
    *(b'{"args": {"a": NaN}}', b'{"args": ' + b'{"":' * 100_000, b"\xff" * 1_000),
]
STATUSES = "201 Made", "204 Empty", "206 Part", "302 Nowhere", "304 Same", "404 No"
REDIRECTS = [
    ("TooManyRedirects", redirect("?test=1")),
    (ENDED, lambda e: redirect("/" + "x" * 50_000) if e.query else b""),
    ("ConnectionRefusedError", redirect("//127.0.0.1:1")),
    ("TooManyRedirects|ConnectionRefusedError", redirect("http://")),
    ("gaierror", redirect("//unknown.invalid")),
    ("InvalidSchema|InvalidURL", redirect("mailto:x")),
]
FAILURES = [  # what the terminal says of a reply, in either view
    *REDIRECTS,
    ("TimeoutError", stall),
    ("TimeoutError", lambda exchange: stall(exchange, HALF)),
    ("IncompleteRead|RemoteProtocolError", HALF),
    (ENDED, b""),
    ("BadStatusLine|RemoteProtocolError", b"220 \x1b[2J smtp\r\n\r\n"),
    ("ConnectionResetError", reset),
    ("ConnectionResetError", lambda exchange: reset(exchange, HALF)),
    ("error", response(ARGS, header=GZIP)),
    (BAD, response(gzip.compress(ARGS)[:15], header=GZIP)),
    *((BAD, response(body)) for body in NOT_HTTPBIN),
    *((BAD.replace("200", status[:3]), response(ARGS, status)) for status in STATUSES),
]


class TestApp(unittest.TestCase):
    @classmethod
    def setUpClass(cls):
        """Start all servers that are processes of their own, at once."""
        cls.proxy, cls.trap, cls.tls = serve(echo), serve(echo), serve(echo, "https")
        live = {"http_proxy": cls.proxy.url, "UPSTREAM": "http://a.invalid/get"}
        trap = {"http_proxy": cls.trap.url, "ALL_PROXY": "socks5://h", "LATENCY": "0"}
        trust = dict.fromkeys(["SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"], str(CERTIFICATE))
        trust["UPSTREAM"] = cls.tls.url
        runserver = "app.py", "runserver", "--noreload", "--nothreading", "0"
        uvicorn = "-m", "uvicorn", "app:application"
        cls.live = cls.start("-c", LIMITED, f"256, {HARD}", **live)
        cls.rich = cls.start("-c", LIMITED, f"{min(HARD, 12_000)}, {HARD}", **trust)
        cls.poor = cls.start("-c", LIMITED, "128, 128", **trap)
        cls.wsgi = cls.start(*runserver, **trap)
        cls.bad_latency = cls.start(*uvicorn, LATENCY="soon")
        cls.bad_upstream = cls.start(*uvicorn, UPSTREAM="ftp://h/")

    @classmethod
    def start(cls, *arguments, **environ):
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        options |= {"cwd": HERE, "env": {**ENVIRON, "PYTHONUNBUFFERED": "1", **environ}}
        child = subprocess.Popen([sys.executable, *arguments], **options)
        cls.addClassCleanup(child.__exit__, None, None, None)
        cls.addClassCleanup(child.kill)
        return child

    def patch(self, **values):
        patcher = mock.patch.multiple(app, **values)
        patcher.start()
        self.addCleanup(patcher.stop)

    def upstream(self, reply):
        """Start an upstream, and make it the app's."""
        server = serve(reply)
        self.patch(urls=app.four(server.url))
        return server

    def get(self, path, port=PORT, headers=None, kind="application/json"):
        """Return the status and the body of a GET, after a look at its headers."""
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        with contextlib.closing(connection):
            connection.request("GET", path, headers=headers or {})
            answer = connection.getresponse()
            self.timing = answer.headers["Server-Timing"]
            self.assertEqual(answer.headers.get_content_type(), kind)
            self.assertNotIn("Set-Cookie", answer.headers)
            return answer.status, answer.read()

    def assert_result(self, *paths, **options):
        for path in paths or VIEWS:
            self.assertEqual(self.get(path, **options), (200, RESULT), path)

    def assert_error(self, path, status, terminal):
        """GET `path`: the client is told the status alone, the terminal the rest."""
        with self.assertLogs("app") as logs:
            answer = self.get(path)
        phrase = http.HTTPStatus(status).phrase.encode()
        self.assertEqual(answer, (status, b'{"error": "%s"}' % phrase))
        terminal = f"(?s)^ERROR:app:{status} for '{path}'{terminal}"
        self.assertRegex("".join(logs.output), terminal)

    def assert_upstream_error(self, reason, url, *paths):
        status = 504 if reason == "TimeoutError" else 502
        # In the terminal a line, short and of ASCII only, without the password
        line = rf": (?!.*secret)(?=[ -~]{{,700}}$)({reason}).* at ['\"\[]+{url}"
        for path in paths or VIEWS:
            with self.subTest(path, reason=reason, url=url):
                self.assert_error(path, status, line)

    def answer_in_reverse(self):
        """Let the upstream answer only where all four are in flight, the last first."""
        answered = [threading.Event() for _ in range(6)]
        answered[5].set()

        def reply(exchange):
            n = int(exchange.query["test"])
            if answered[n + 1].wait(WAIT):
                exchange.wfile.write(echo(exchange))
                answered[n].set()
            return b""

        self.upstream(reply)

    def test_magic_has_all_four_in_flight_together_and_keeps_their_order(self):
        self.answer_in_reverse()
        self.assert_result("/magic")

    def test_the_view_of_the_readme_has_all_four_in_flight_together(self):
        readme = (HERE / "README.md").read_text(encoding="utf-8")
        (view,) = re.findall(r"```python\n([^`]*def threads\([^`]*)```", readme)
        self.answer_in_reverse()
        self.patch(urlpatterns=[*app.urlpatterns])
        exec(view, vars(app))  # noqa: S102
        clear_url_caches()
        self.addCleanup(clear_url_caches)
        self.assert_result("/threads")

    def test_index_has_one_in_flight_and_server_timing_tells_each_in_milliseconds(self):
        def reply(exchange):
            self.assertTrue(free.acquire(blocking=False))
            time.sleep(0.02 * int(exchange.query["test"]))
            free.release()
            return echo(exchange)

        self.upstream(reply)
        for view, total, most in ("/", sum, 1), ("/magic", max, 4):
            free = threading.Semaphore(most)
            start = time.perf_counter()
            self.assert_result(view)
            took = (time.perf_counter() - start) * 1000
            pattern = ", ".join(rf"get{n};dur=(\d+\.\d)" for n in (1, 2, 3, 4))
            times = [float(ms) for ms in re.fullmatch(pattern, self.timing).groups()]
            for n, ms in enumerate(times, 1):
                self.assertGreaterEqual(ms, 20 * n, self.timing)
            self.assertLessEqual(total(times), took, view)

    def test_a_request_neither_reaches_nor_chooses_the_upstream(self):
        server, trap = self.upstream(echo), serve(echo)
        names = "Host Forwarded X-Forwarded-Host X-Upstream Cookie Authorization Range"
        headers = dict.fromkeys(names.split(), f"{trap.address}/forged")
        query = urlencode(dict.fromkeys(["upstream", "url", "urls", "test"], trap.url))
        for view in VIEWS:
            self.assert_result(f"{view}?{query}", headers=headers)
        read = mock.Mock(side_effect=AssertionError("a view reads its request"))
        request = type("", (), {"__getattribute__": read, "__bool__": read})()
        app.index(request)
        asyncio.run(app.magic(request))
        self.assertEqual(trap.exchanges, [])
        expected = [f"/get?test={n}" for n in "1111222233334444"]
        self.assertEqual(sorted(each.path for each in server.exchanges), expected)
        users = {each.headers["Authorization"] for each in server.exchanges}
        self.assertEqual(users, {"Basic dXNlcjpzZWNyZXQ="})
        sent = {str(each.headers) for each in server.exchanges}
        self.assertEqual(len(sent), 2, "not the same from each library every time")
        # Each has a connection of its own, although the upstream keeps them open
        self.assertEqual(len({each.client_address for each in server.exchanges}), 16)

    def test_redirects_are_followed_and_no_certificate_is_read(self):
        def reply(exchange):
            moved = exchange.path.replace("get", "moved")
            return echo(exchange) if exchange.path == moved else redirect(moved)

        self.upstream(reply)
        with mock.patch("ssl.create_default_context", side_effect=AssertionError):
            self.assert_result()

    def test_the_stand_in_waits_and_answers_this_machine_with_its_query(self):
        self.assert_result()
        self.assertEqual(DEFAULTS, (1.5, 10))
        self.assertEqual(app.urls[0], f"http://127.0.0.1:{PORT}/get?test=1")
        with self.assertRaises(OSError):
            socket.create_connection(("127.0.0.2", PORT), timeout=1)
        self.patch(LATENCY=WAIT)
        with socket.create_connection(("127.0.0.1", PORT)) as waiting:
            waiting.sendall(b"GET /get HTTP/1.1\r\nHost: test\r\n\r\n")
            waiting.settimeout(0.2)
            self.assertRaises(TimeoutError, waiting.recv, 1)
            self.patch(LATENCY=0)
            answer = 200, b'{"args": {"a": "1", "b": "x y"}}'
            self.assertEqual(self.get("/get?a=1&b=x+y"), answer)
            self.assertRaises(TimeoutError, waiting.recv, 1)

    def test_the_url_of_an_upstream_is_kept_or_ends_the_program(self):
        url = "https://user@upstream:8443/a/b?key=a+b&test=0"
        self.assertEqual(app.four(url)[2], f"{url}&test=3")
        bad = "h", "ftp://h", "http:///get", "http://:80", "http://[::1", "http://xn--/"
        for url in bad:
            with self.subTest(url), self.assertRaisesRegex(SystemExit, "^UPSTREAM"):
                app.four(url)

    @unittest.skipIf(sys.version_info < (3, 11), "tomllib is new in Python 3.11")
    def test_the_metadata_of_the_script_is_requirements_txt(self):
        source = (HERE / "app.py").read_text(encoding="utf-8")
        (block,) = re.findall(r"(?m)^# /// script\n((?:# .*\n)+)# ///$", source)
        lines = (HERE / "requirements.txt").read_text(encoding="utf-8").splitlines()
        required = [line.partition("#")[0].strip() for line in lines]
        metadata = {"requires-python": ">=3.10", "dependencies": required}
        tomllib = importlib.import_module("tomllib")
        self.assertEqual(tomllib.loads(re.sub("(?m)^# ", "", block)), metadata)

    def test_a_failure_is_502_or_504_in_both_views_and_the_next_request_works(self):
        server = self.upstream(echo)
        for reason, server.reply in FAILURES:
            redirects = (reason, server.reply) in REDIRECTS
            url = "" if redirects else rf"http://{server.address}/get\?test="
            timeout = 0.1 if reason == "TimeoutError" else 30
            some = app.urls[:1] if redirects else app.urls
            server.exchanges = []
            with mock.patch.multiple(app, TIMEOUT=timeout, urls=some):
                self.assert_upstream_error(reason, url)
            asked = [each.path for each in server.exchanges].count("/get?test=1")
            self.assertTrue(asked <= 2 or redirects, "more than once for a view")
            server.reply = echo
            self.assert_result("/magic")
        self.assert_result()

    def test_an_upstream_that_cannot_be_reached_is_502_or_504(self):
        self.patch(TIMEOUT=0.2)
        full = socket.create_server(("127.0.0.1", 0), backlog=0)
        self.addCleanup(full.close)
        self.addCleanup(socket.create_connection(full.getsockname()).close)
        for host, reason in [
            ("127.0.0.1:1", "ConnectionRefusedError"),
            ("127.0.0.1:65537", "LocationParseError|ConnectionRefusedError|gaierror"),
            ("unknown.invalid", "gaierror"),
            (f"127.0.0.1:{full.getsockname()[1]}", "TimeoutError"),
        ]:
            self.patch(urls=app.four(f"http://user:secret@{host}/get"))
            self.assert_upstream_error(reason, f"http://{host}/get")

    def wait_for_four(self, then=lambda exchange: None):
        """Let the upstream do `then` with four together; return what it reads after."""
        self.patch(TIMEOUT=60)
        together, after = threading.Barrier(4, timeout=WAIT), queue.Queue()

        def reply(exchange):
            together.wait()
            after.put("arrived")
            then(exchange)
            after.put(stall(exchange))
            return b""

        self.upstream(reply)
        return lambda n: [after.get(timeout=WAIT) for _ in range(n)]

    def test_one_broken_fetch_fails_magic_without_waiting_for_the_others(self):
        read = self.wait_for_four(lambda e: e.query["test"] == "3" and reset(e))
        third = app.urls[2].partition("@")[2].replace("?", r"\?") + "'$"
        self.assert_upstream_error("ConnectionResetError", f"http://{third}", "/magic")
        self.assertEqual(read(7).count(b""), 3)

    def test_a_client_that_leaves_takes_the_fetches_of_magic_with_it(self):
        read = self.wait_for_four()
        with socket.create_connection(("127.0.0.1", PORT)) as client:
            client.sendall(b"GET /magic HTTP/1.1\r\nHost: test\r\n\r\n")
            self.assertEqual(read(4), ["arrived"] * 4)
        self.assertEqual(read(4), [b""] * 4)

    def test_magic_lets_a_cancellation_through(self):
        async def cancel():
            task = asyncio.create_task(app.magic(None))
            await asyncio.to_thread(read, 4)
            task.cancel()
            await task

        read = self.wait_for_four()
        self.assertRaises(asyncio.CancelledError, asyncio.run, cancel())
        self.assertEqual(read(4), [b""] * 4)

    def test_a_broken_view_is_a_plain_500_with_its_traceback_in_the_terminal(self):
        fault, nothing = mock.Mock(side_effect=OSError("mine")), lambda responses: None
        for broken, last in (fault, "OSError: mine"), (nothing, "returned None"):
            self.patch(answer=broken)
            for view in VIEWS:
                self.assert_error(view, 500, f"\nTraceback .*{last}")
            with override_settings(DEBUG=True), self.assertLogs("django.request"):
                page = self.get("/magic", kind="text/html")[1]
            self.assertIn(last.split(": ")[-1], page.decode())

    def port_of(self, child, first_line):
        """Read the terminal of a server until it says where it serves."""
        other = f"(?!.*{re.escape(str(app.settings.SECRET_KEY))})"  # each has its own
        self.assertRegex(child.stdout.readline(), first_line + other)
        said = next(line for line in child.stdout if "http://127.0.0.1:" in line)
        return int(re.search(r"http://127.0.0.1:(\d+)", said)[1])

    def test_a_live_upstream_is_fetched_through_the_proxy_of_the_environment(self):
        port = self.port_of(self.live, f"^1.5 {min(HARD, 10_240)} ")
        self.assert_result(port=port)
        self.assertEqual(self.proxy.exchanges[0].path, "http://a.invalid/get?test=1")
        self.proxy.reply = b""
        self.assertEqual([self.get(view, port)[0] for view in VIEWS], [502, 502])
        self.live.send_signal(signal.SIGINT)
        lines = self.live.communicate(timeout=WAIT)[0].splitlines()
        ours = [line[:11] for line in lines if not line.startswith("INFO: ")]
        self.assertEqual(ours, ["502 for '/'", "502 for '/m"])

    def test_the_stand_in_serves_a_wsgi_server_of_one_thread_past_any_proxy(self):
        port = self.port_of(self.wsgi, "^Performing system checks")
        self.assert_result(port=port)
        self.assertEqual(self.trap.exchanges, [])
        self.wsgi.send_signal(signal.SIGINT)
        self.assertNotIn("/get", self.wsgi.communicate(timeout=WAIT)[0])

    def test_the_certificate_of_an_upstream_has_to_be_trusted(self):
        self.patch(urls=app.four(self.tls.url))
        self.assert_upstream_error("SSLCertVerificationError", "https://127")
        app.TLS.load_verify_locations(CERTIFICATE)  # for its own name alone
        self.patch(urls=app.four(self.tls.url.replace("127.0.0.1", "localhost")))
        with mock.patch.dict(os.environ, REQUESTS_CA_BUNDLE=str(CERTIFICATE)):
            self.assert_upstream_error("SSLCertVerificationError", "https://localhost")
        self.assert_result(port=self.port_of(self.rich, f"^1.5 {min(HARD, 12_000)} "))

    def test_a_crowd_is_answered_in_json_where_files_run_out(self):
        port = self.port_of(self.poor, "^0.0 128 ")
        crowd = [http.client.HTTPConnection("127.0.0.1", port) for _ in range(40)]
        for connection in crowd:
            connection.timeout = WAIT
            self.addCleanup(connection.close)
            connection.request("GET", "/get")  # so that it has been accepted
            connection.getresponse().read()
        for connection in crowd:
            connection.request("GET", "/magic")
        answers = [connection.getresponse() for connection in crowd]
        self.assertIn(502, [answer.status for answer in answers])
        types = {answer.headers["Content-Type"] for answer in answers}
        self.assertEqual(types, {"application/json"})
        self.assert_result(port=port)

    def test_a_bad_environment_variable_stops_the_start_and_is_named(self):
        terminal = self.bad_latency.communicate(timeout=3 * WAIT)[0]
        self.assertRegex(terminal, r"(?s)LATENCY = float\(.*ValueError: .*'soon'\n$")
        message = "UPSTREAM must be an http or https URL with a host\n"
        self.assertEqual(self.bad_upstream.communicate(timeout=3 * WAIT)[0], message)
        self.assertEqual((self.bad_latency.wait(), self.bad_upstream.wait()), (1, 1))
