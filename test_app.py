"""Tests of app.py: requests to a real uvicorn, and an upstream that a test scripts."""

import asyncio
import http.client
import http.server
import importlib
import json
import os
import pathlib
import re
import resource
import socket
import socketserver
import ssl
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import suppress
from datetime import timedelta
from unittest import TestCase, mock

import httpx
import requests
from django.test import override_settings

KEPT = "PATH", "PYTHONPATH", "LD_LIBRARY_PATH"  # but no LATENCY, and no proxy
ENVIRON = {k: v for k, v in os.environ.items() if k in KEPT} | {"NETRC": os.devnull}
mock.patch.dict(os.environ, ENVIRON, clear=True).start()  # before the import of app
app = importlib.import_module("app")

HERE = pathlib.Path(__file__).parent
SOURCE = (HERE / "app.py").read_text(encoding="utf-8")
README = (HERE / "README.md").read_text(encoding="utf-8")
CERTIFICATE = str(HERE / ".ci" / "127.0.0.1.pem")  # with its key; nobody trusts it
PORT = httpx.URL(app.urls[0]).port  # the stand-in's uvicorn serves the views as well
VIEWS = "/", "/magic"
RESULT = '{"result": [{"test": "1"}, {"test": "2"}, {"test": "3"}, {"test": "4"}]}'
UVICORN = "-m", "uvicorn", "app:application", "--port", "0"
WAIT = 10  # seconds, in which anything that is to happen has happened


class Upstream(socketserver.ThreadingTCPServer):
    """A server on a free port; its reply is bytes, or a function that returns them."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, reply):
        super().__init__(("127.0.0.1", 0), Exchange)
        self.host = f"127.0.0.1:{self.server_address[1]}"
        self.url = f"http://me:a@secret@{self.host}/get"
        self.reply, self.exchanges, self.together = reply, [], threading.Barrier(4)
        self.arrived, self.left = threading.Semaphore(0), threading.Semaphore(0)
        threading.Thread(target=self.serve_forever, args=[0.01]).start()


class Exchange(http.server.BaseHTTPRequestHandler):
    timeout = 4  # seconds; httpx waits 5 if it is not told its timeout

    def do_GET(self):
        self.args = dict(httpx.URL(self.path).params)
        self.server.exchanges.append(self)
        self.server.arrived.release()
        reply = self.server.reply
        with suppress(OSError):  # the app may have left
            self.wfile.write(reply(self) if callable(reply) else reply)

    def log_message(self, *args): ...


def response(body, status="200 OK", header="Set-Cookie: of=upstream"):
    head = f"HTTP/1.1 {status}\r\n{header}\r\nContent-Length: {len(body)}\r\n"
    return f"{head}Connection: close\r\n\r\n".encode() + body


def echo(exchange):
    """Answer as httpbin's /get does."""
    body = {"args": exchange.args, "headers": {}, "origin": "", "url": exchange.path}
    return response(json.dumps(body).encode())


def last_first(exchange):
    """Answer once all four are in flight, and ?test=4 first."""
    exchange.server.together.wait(WAIT)
    time.sleep(0.02 * (4 - int(exchange.args["test"])))
    return echo(exchange)


def stall(exchange, start=b""):
    """Answer no more than the start, and note whether the app leaves."""
    exchange.wfile.write(start)
    if exchange.connection.recv(1) == b"":
        exchange.server.left.release()
    return b""


def third_hangs_up(exchange):
    """Hang up on ?test=3 once all four are in flight, and stall the others."""
    exchange.server.together.wait(WAIT)
    return b"" if exchange.args["test"] == "3" else stall(exchange)


HALF = response(b'{"args": {}}')[:-5]
FAILURES = {
    "breaks off": HALF,
    "speaks no HTTP": b"220 \x1b[2J smtp\r\n\r\n",
    "is compressed badly": response(b"no gzip", header="Content-Encoding: gzip"),
    "redirects for ever": response(b"", "302 Found", "Location: ?test=1"),
    "redirects to no URL": response(b"", "302 Found", "Location: mailto:x"),
    "created": response(b'{"args": {}}', "201 Created"),
    "not found": response(b'{"args": {}}', "404 Not Found"),
    "no JSON": response(b"<html>"),
    "no UTF-8": response(b'{"args": {"a": "\xff"}}'),
    "nested too deeply": response(b'{"args": ' + b'{"":' * 100_000),
    "not a number": response(b'{"args": {"a": NaN}}'),
    "too large a number": response(b'{"args": {"a": 1e999}}'),
    "no object": response(b'["args"]'),
    "no args": response(b"{}"),
    "args are null": response(b'{"args": null}'),
    "args are a list": response(b'{"args": [["a", "b"]]}'),
}


def get(path, port=PORT, **options):
    """GET a path of the app; return the status and the body of its answer."""
    answer = requests.get(f"http://127.0.0.1:{port}{path}", timeout=20, **options)
    return answer.status_code, answer.text


def load(source=SOURCE, **environ):
    """Run app.py again, with mocks of Server and configure; return its globals."""
    loaded = {"__name__": "app"}
    configure = mock.patch("django.conf.LazySettings.configure")
    server = mock.patch("uvicorn.Server")
    with mock.patch.dict(os.environ, environ), server, configure as loaded["configure"]:
        try:
            exec(source, loaded)  # noqa: S102
        finally:
            loaded.get("listener", mock.Mock()).close()
    return loaded


class AppTest(TestCase):
    def patch(self, **values):
        """Replace globals of app.py for the rest of the test."""
        patcher = mock.patch.multiple(app, **values)
        patcher.start()
        self.addCleanup(patcher.stop)

    def fetch_from(self, url):
        self.patch(urls=[f"{url}?test={n}" for n in (1, 2, 3, 4)])

    def upstream(self, reply):
        """Start an upstream, and let the app fetch from it."""
        upstream = Upstream(reply)
        self.addCleanup(upstream.server_close)
        self.addCleanup(upstream.shutdown)
        self.fetch_from(upstream.url)
        return upstream

    def assert_result(self, *views, **options):
        for view in views:
            self.assertEqual(get(view, **options), (200, RESULT), view)

    def assert_error(self, status, terminal, views=VIEWS):
        """The client is told the status alone, the terminal what matches a regex."""
        body = json.dumps({"error": http.HTTPStatus(status).phrase})
        for view in views:
            with self.assertLogs("app") as logs:
                self.assertEqual(get(view + "?query"), (status, body), view)
            (text,) = logs.output
            self.assertRegex(text, rf"^ERROR:app:{status} for '{view}'{terminal}\Z")
            self.assertNotIn("secret", text)

    def assert_released(self, semaphore, times):
        for _ in range(times):
            self.assertTrue(semaphore.acquire(timeout=WAIT))

    def leave(self, path, upstream, fetches):
        """Send a GET to the app, and hang up when so many fetches have arrived."""
        with socket.create_connection(("127.0.0.1", PORT)) as client:
            client.sendall(f"GET {path} HTTP/1.1\r\nHost: test\r\n\r\n".encode())
            self.assert_released(upstream.arrived, fetches)

    def start(self, *arguments, folder=HERE, **environ):
        """Start another Python; return its process, whose terminal is a file."""
        out = tempfile.NamedTemporaryFile("r")  # noqa: SIM115
        setup = {"cwd": folder, "env": ENVIRON | environ, "stdout": out, "stderr": out}
        process = subprocess.Popen([sys.executable, "-u", *arguments], **setup)
        for cleanup in out.close, process.wait, process.kill:
            self.addCleanup(cleanup)
        process.terminal = lambda: pathlib.Path(out.name).read_text()
        return process

    def port_of(self, process):
        """Wait until a server says its port."""
        for _ in range(1000):  # of 0.02 seconds
            if port := re.search(r"http://127.0.0.1:(\d+)", process.terminal()):
                return int(port[1])
            time.sleep(0.02)
        return self.fail(process.terminal())


class WhatIsInFlight(AppTest):
    def test_magic_has_all_four_in_flight_and_keeps_their_order(self):
        self.upstream(last_first)
        self.assert_result("/magic")

    def test_index_has_one_in_flight_and_blocks_nobody(self):
        def one_alone(exchange):
            get("/nowhere")  # on the same server, which has time for it
            alone = len(exchange.server.exchanges) == int(exchange.args["test"])
            return echo(exchange) if alone else b""

        self.upstream(one_alone)
        self.assert_result("/")

    def test_one_broken_fetch_fails_magic_and_ends_the_others(self):
        upstream = self.upstream(third_hangs_up)
        self.assert_error(502, r": .* at '[^ ]*\?test=3'", ["/magic"])
        self.assert_released(upstream.left, 3)
        self.assertEqual(len(upstream.exchanges), 4)

    def test_a_client_that_leaves_magic_ends_its_fetches_and_logs_nothing(self):
        upstream = self.upstream(stall)
        with self.assertNoLogs("asyncio"):
            self.leave("/magic", upstream, 4)
            self.assert_released(upstream.left, 4)

    def test_a_client_that_leaves_index_does_not_end_its_fetches(self):
        upstream = self.upstream(echo)
        self.leave("/", upstream, 1)
        self.assert_released(upstream.arrived, 3)


class WhatTheUpstreamIsAsked(AppTest):
    def test_a_request_changes_nothing_of_it(self):
        other, upstream = self.upstream(echo), self.upstream(echo)
        names = "Host Forwarded Cookie Authorization Range User-Agent Traceparent"
        forged = dict.fromkeys(names.split(), other.host)
        query = f"?test=5&url=http://{other.host}&urls=http://{other.host}"
        for view in VIEWS:
            upstream.exchanges.clear()
            self.assert_result(view)
            self.assert_result(view + query, headers=forged)
            asked = [each.path + str(each.headers) for each in upstream.exchanges]
            self.assertEqual(sorted(asked[:4]), sorted(asked[4:]))
            self.assertNotIn("Cookie", "".join(asked))
            self.assertIn("Basic bWU6YUBzZWNyZXQ=", asked[0])  # me:a@secret
        self.assertEqual(other.exchanges, [])
        app.index(None)  # for the views do not even look at their request
        asyncio.run(app.magic(None))

    def test_redirects_are_followed(self):
        def three_times(exchange):
            if exchange.path.startswith("/get/get/get/get"):
                return echo(exchange)
            return response(b"", "302 Found", f"Location: /get{exchange.path}")

        self.upstream(three_times)
        self.assert_result(*VIEWS)


class WhatTheAnswerSays(AppTest):
    def test_the_args_are_handed_on_as_they_are(self):
        for args in {}, {"": ""}, {"a": ["1", "2"], "b": {}}, {"a": "\ud800"}, {"é": 1}:
            self.upstream(response(json.dumps({"args": args}).encode()))
            for view in VIEWS:
                self.assertEqual(json.loads(get(view)[1]), {"result": [args] * 4})

    def test_server_timing_is_in_milliseconds_and_no_header_says_more(self):
        three = []
        for seconds in 1234.56789, 0, 1.5:
            three.append(httpx.Response(200, json={"args": {}}, headers={"a": "b"}))
            three[-1].elapsed = timedelta(seconds=seconds)
        timing = "get1;dur=1234567.9, get2;dur=0.0, get3;dur=1500.0"
        expected = {"Content-Type": "application/json", "Server-Timing": timing}
        self.assertEqual(dict(app.answer(three).headers), expected)

    def test_no_header_says_why_a_fetch_failed_and_it_is_not_tried_again(self):
        upstream = self.upstream(b"")
        with self.assertLogs("app"):
            headers = requests.get(f"http://127.0.0.1:{PORT}/", timeout=WAIT).headers
        usual = {"content-type", "date", "server", "transfer-encoding"}
        self.assertEqual(set(headers), usual)
        self.assertEqual(len(upstream.exchanges), 1)


class WhenAFetchFails(AppTest):
    def test_a_bad_answer_is_502_and_the_next_fetch_works(self):
        upstream = self.upstream(echo)
        for name, upstream.reply in FAILURES.items():
            with self.subTest(name):
                self.assert_error(502, "[ -~]*")
        upstream.reply = echo
        self.assert_result(*VIEWS)

    def test_the_terminal_says_why_and_where_in_short_and_no_password(self):
        refused = r": ConnectionRefusedError\(.*\) at 'http://127\.0\.0\.1:1/"
        for user in "secret", "me:secret", "me:!$&()*+,;=:secret", "me:a@secret":
            self.fetch_from(f"http://{user}@127.0.0.1:1/" + "x" * 1000)
            self.assert_error(502, f"{refused}x{{540,640}}")

    def test_an_upstream_that_takes_too_long_is_504(self):
        self.assertEqual(app.TIMEOUT, 10)
        self.patch(TIMEOUT=0.1)
        for start in b"", HALF:
            upstream = self.upstream(lambda e, start=start: stall(e, start))
            self.assert_error(504, f": TimeoutError.*{upstream.host}/get.*")
        full = socket.create_server(("127.0.0.1", 0), backlog=0)
        self.addCleanup(full.close)
        self.addCleanup(socket.create_connection(full.getsockname()).close)
        self.fetch_from(f"http://127.0.0.1:{full.getsockname()[1]}/get")
        self.assert_error(504, ": TimeoutError.*")

    def test_a_certificate_has_to_be_trusted_and_of_its_host(self):
        upstream = self.upstream(echo)
        tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        tls.load_cert_chain(CERTIFICATE)
        upstream.socket = tls.wrap_socket(upstream.socket, server_side=True)
        self.fetch_from(f"https://{upstream.host}/get")
        self.assert_error(502, ".*self.signed certificate.*")
        self.patch(TLS=load(SSL_CERT_FILE=CERTIFICATE)["TLS"])
        with mock.patch.dict(os.environ, REQUESTS_CA_BUNDLE=CERTIFICATE):
            self.assert_result(*VIEWS)
            self.fetch_from(f"https://localhost:{upstream.server_address[1]}/get")
            self.assert_error(502, ".*ostname mismatch.*")

    def test_any_other_exception_is_500_with_its_traceback(self):
        self.upstream(echo)
        self.patch(answer=mock.Mock(side_effect=OSError("mine")))
        self.assert_error(500, r"\nTraceback (.*\n)*OSError: mine")
        with override_settings(DEBUG=True), self.assertLogs("django.request"):
            self.assertIn("OSError at /magic", get("/magic")[1])

    def test_a_timeout_that_a_view_cuts_off_by_from_none_is_no_504(self):
        error = httpx.ReadError("mine")
        error.__context__ = TimeoutError()
        error.__suppress_context__ = True
        self.upstream(echo)
        self.patch(answer=mock.Mock(side_effect=error))
        self.assert_error(502, r": ReadError\('mine'\) at .*")

    def test_a_crowd_is_answered_in_json_where_files_run_out(self):
        limit = "from resource import *; setrlimit(RLIMIT_NOFILE, (64, 64)); "
        run = limit + "import uvicorn; uvicorn.main()"
        server = self.start("-c", run, *UVICORN[2:], UPSTREAM=self.upstream(echo).url)
        port = self.port_of(server)
        crowd = [http.client.HTTPConnection("127.0.0.1", port) for _ in range(40)]
        for client in crowd:
            self.addCleanup(client.close)
            client.request("GET", "/nowhere")  # so that it has been accepted
            client.getresponse().read()
        for client in crowd:
            client.request("GET", "/magic")
        bodies = {client.getresponse().read().decode() for client in crowd}
        self.assertEqual(bodies - {RESULT}, {'{"error": "Bad Gateway"}'})
        self.assertIn("\n502 for '/magic': OSError(", server.terminal())
        self.assertNotIn("secret", server.terminal())
        self.assert_result(*VIEWS, port=port)


class TheStart(AppTest):
    def test_latency_is_in_seconds(self):
        for latency, seconds in ("", 1.5), ("0", 0), ("20.25", 20.25):
            self.assertEqual(load(LATENCY=latency)["LATENCY"], seconds)
        self.assertRaises(ValueError, load, LATENCY="soon")

    def test_an_upstream_keeps_its_url_and_starts_no_stand_in(self):
        loaded = load(UPSTREAM="https://user@upstream:8443/a/b?key=a+b")
        expected = "https://user@upstream:8443/a/b?key=a+b&test="
        self.assertEqual(loaded["urls"], [f"{expected}{n}" for n in (1, 2, 3, 4)])
        loaded["Server"].assert_not_called()
        self.assertIn("http://127.0.0.1:", load(UPSTREAM="")["urls"][0])

    def test_urls_that_are_pasted_start_no_stand_in(self):
        pasted = re.sub("(?m)^urls = .*$", 'urls = ["https://httpbin.org/get"]', SOURCE)
        load(pasted)["Server"].assert_not_called()

    def test_an_upstream_that_is_no_url_ends_the_start(self):
        for url in "host", "host/get", "ftp://h", "ttp://h", "httpx://h", "http:///get":
            self.assertRaisesRegex(SystemExit, "^UPSTREAM .* host$", load, UPSTREAM=url)

    def test_each_start_has_a_secret_key_of_its_own(self):
        calls = [load(UPSTREAM="http://h")["configure"].call_args for _ in range(2)]
        self.assertNotEqual(*[call.kwargs["SECRET_KEY"] for call in calls])

    def test_the_limit_of_open_files_is_raised_where_it_can_be(self):
        for soft, hard, raised, refusal in [
            (256, 2**63 - 1, 10_240, ValueError),
            (1024, 4096, 4096, OSError),
            (20_000, 30_000, 20_000, None),
        ]:
            getrlimit = mock.patch("resource.getrlimit", return_value=(soft, hard))
            setrlimit = mock.patch("resource.setrlimit", side_effect=refusal)
            with getrlimit, setrlimit as called:
                load(UPSTREAM="http://h")
            called.assert_called_once_with(resource.RLIMIT_NOFILE, (raised, hard))
        with mock.patch.dict(sys.modules, resource=None):  # as on Windows
            load(UPSTREAM="http://h")

    def test_the_stand_in_waits_and_answers_with_the_query(self):
        self.patch(LATENCY=20.25, asyncio=mock.Mock(sleep=mock.AsyncMock()))
        body = '{"args": {"a": "", "test": "4"}}'
        self.assertEqual(get("/get?a=&test=4"), (200, body))
        app.asyncio.sleep.assert_awaited_once_with(20.25)

    def test_the_stand_in_serves_a_room_full_of_people_but_no_other_machine(self):
        self.patch(LATENCY=0)
        for _ in range(300):
            self.addCleanup(socket.create_connection(("127.0.0.1", PORT)).close)
        self.assertEqual(get("/get"), (200, '{"args": {}}'))
        self.assertRaises(OSError, socket.create_connection, ("127.0.0.2", PORT), 1)

    def test_the_stand_in_runs_in_asyncios_own_loop(self):
        self.assertNotIn("uvloop", sys.modules)

    def test_the_stand_in_serves_as_soon_as_app_is_imported(self):
        run = "import app, socket; socket.create_connection(app.listener.getsockname())"
        self.assertEqual(self.start("-c", run).wait(WAIT), 0)

    def test_a_stand_in_that_cannot_start_is_not_waited_for(self):
        code = "import uvicorn; uvicorn.Server.run = id; import app"
        self.assertEqual(self.start("-c", code).wait(WAIT), 0)

    def test_the_command_prints_each_fetch(self):
        server = self.start(*UVICORN, LATENCY="0")
        self.assert_result("/", port=self.port_of(server))
        lines = re.findall('"GET (.*) HTTP/1.1" 200 OK', server.terminal())
        self.assertEqual(lines, [*(f"/get?test={n}" for n in (1, 2, 3, 4)), "/"])

    def test_a_live_upstream_is_fetched_through_the_proxy(self):
        proxy, url = self.upstream(echo), "http://upstream.invalid/get"
        server = self.start(*UVICORN, http_proxy=proxy.url, UPSTREAM=url)
        self.assert_result(*VIEWS, port=self.port_of(server))
        asked = sorted(each.path for each in proxy.exchanges)
        self.assertEqual(asked, [f"{url}?test={n}" for n in "11223344"])

    def test_runserver_fetches_from_the_stand_in_past_any_proxy(self):
        proxies = {"http_proxy": "http://127.0.0.1:1", "ALL_PROXY": "socks5://proxy"}
        runserver = "app.py", "runserver", "--noreload", "--nothreading", "0"
        server = self.start(*runserver, LATENCY="0", no_proxy="other", **proxies)
        self.assert_result(*VIEWS, *VIEWS, port=self.port_of(server))
        self.assertNotIn("/get", server.terminal())  # the terminal is runserver's alone

    def test_a_server_may_fork_right_after_the_import(self):
        fork = "import app, os, signal, uvicorn; os.fork() and (os.wait(), os._exit(0))"
        serve = "uvicorn.run(app.application, port=0, limit_max_requests=2)"
        server = self.start("-c", f"{fork}; signal.alarm(20); {serve}", LATENCY="0")
        self.assert_result(*VIEWS, port=self.port_of(server))


class TheReadme(AppTest):
    def test_its_code_does_what_it_says(self):
        (settings,) = re.findall(r"```text\n(DATABASES=.*?)```", README, re.DOTALL)
        views = "".join(re.findall(r"```python\n(.*?)```", README, re.DOTALL))
        source = SOURCE.replace("SECRET_KEY", f"{settings}SECRET_KEY")
        source = source.replace("if __name__", f"{views}if __name__")
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        pathlib.Path(folder.name, "app.py").write_text(source)
        upstream = self.upstream(last_first)
        options = {"folder": folder.name, "UPSTREAM": upstream.url}
        self.assertEqual(self.start("app.py", "migrate", **options).wait(3 * WAIT), 0)
        port = self.port_of(self.start(*UVICORN, **options))
        self.assertIn("example.com", get("/site", port)[1])
        self.assert_result("/threads", port=port)  # with all four in flight
        upstream.reply = stall
        self.assertEqual(get("/later", port)[0], 200)
        self.assert_released(upstream.arrived, 8)
        self.assertFalse(upstream.left.acquire(timeout=0.2))

    def test_requirements_txt_and_app_py_name_the_same_packages(self):
        required = re.findall(r"(?m)^\S+", (HERE / "requirements.txt").read_text())
        block = SOURCE.partition("# /// script\n")[2].partition("# ///\n")[0]
        self.assertEqual(re.findall('"(.*?)"', block), required)
        install = 'pip install django httpx requests sniffio "uvicorn[standard]"'
        self.assertIn(f"\n    {install}\n    uvicorn app:application\n", app.__doc__)
