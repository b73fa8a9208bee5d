"""Tests of app.py, served by a real uvicorn in a thread of this process.

The app's urls lead to the upstream below, which sends what upstream.reply(fetch)
returns. A test that wants another reply than echo sets upstream.reply."""

import json
import logging
import os
import re
import signal
import socket
import ssl
import sys
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from queue import Queue
from socketserver import ThreadingTCPServer
from subprocess import PIPE, STDOUT, Popen, run
from tempfile import TemporaryDirectory
from threading import Barrier, Event, Thread, Timer
from time import monotonic, sleep
from unittest import TestCase, skipIf
from unittest.mock import patch

import requests
import uvicorn
from django.test import RequestFactory, override_settings
from django.views.defaults import server_error

import app

HERE = Path(__file__).parent
SOURCE = (HERE / "app.py").read_text("utf-8")
README = (HERE / "README.md").read_text("utf-8")
VIEWS, _, PASTED = re.findall("(?s)```python\n(.*?)```", README)
SETTINGS = re.search("(?s)```text\n(    INSTALLED_APPS.*?)```", README)[1]
PEM = HERE / ".ci" / "127.0.0.1.pem"  # a self-signed certificate and its key
WAIT = 4  # seconds until a test gives up, before httpx's own timeout of 5
ALL_FOUR = Barrier(4, timeout=3)  # wait() raises an error unless four wait together
OK = 200, {"result": [{"test": "1"}, {"test": "2"}, {"test": "3"}, {"test": "4"}]}
SERVER_ERROR = 500, server_error(RequestFactory().get("/")).content.decode()
HEAD = b"HTTP/1.0 200 OK\r\n\r\n"
BAD_REPLIES = {
    "hangs up": b"",
    "breaks off": b'HTTP/1.0 200 OK\r\nContent-Length: 99\r\n\r\n{"args": {}}',
    "is no HTTP": b"220 ftp.example.org\r\n",
    "is a 404": b'HTTP/1.0 404 Not Found\r\n\r\n{"args": {}}',
    "is a 503": b'HTTP/1.0 503 Service Unavailable\r\n\r\n{"args": {}}',
    "is no JSON": HEAD + b"{'args': {}}",
    "has no args": HEAD + b"{}",
}
UVICORN = "-m", "uvicorn", "app:application", "--port", "0"  # 0: any free port
RUNSERVER = "app.py", "runserver", "--noreload", "0"
DEAD_PROXIES = {"no_proxy": "", "http_proxy": "socks://x", "ALL_PROXY": "socks://x"}
NO_DNS = "import socket\ndel socket.getfqdn, socket.getaddrinfo, socket.gethostbyname\n"


class Fetch(BaseHTTPRequestHandler):  # one fetch, as the upstream sees it
    def do_GET(self):
        self.number = self.path[-1]  # "1" to "4"
        self.wfile.write(upstream.reply(self))


def echo(fetch):
    """Reply as httpbin.org/get does."""
    return HEAD + json.dumps({"args": {"test": fetch.number}}).encode()


def last_first(fetch):
    """Wait until all four fetches are there, and reply to the last one first."""
    ALL_FOUR.wait()
    sleep(0.1 * (4 - int(fetch.number)))
    return echo(fetch)


def stall(fetch):
    """Send nothing until the app closes the connection."""
    fetch.connection.settimeout(2 * WAIT)
    return fetch.rfile.read()


upstream = ThreadingTCPServer(("127.0.0.1", 0), Fetch)
URLS = [f"http://127.0.0.1:{upstream.server_address[1]}/get?test={n}" for n in "1234"]
STAND_IN_URLS = app.urls  # to the server that app.py itself starts
listener = socket.create_server(("127.0.0.1", 0))
PORT = listener.getsockname()[1]
server = uvicorn.Server(uvicorn.Config(app.application, log_config=None))
serving = Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)


def setUpModule():
    patch.object(app, "urls", URLS).start()
    patch.object(app.StandIn, "log_message").start()  # prints nothing here
    logging.getLogger("django.request").addHandler(logging.NullHandler())  # nor this
    Thread(target=upstream.serve_forever, daemon=True).start()
    serving.start()


def tearDownModule():
    server.should_exit = True
    serving.join(WAIT)


def get(path, port=PORT, **options):
    """Return the status and the body, decoded if its Content-Type is JSON's."""
    answer = requests.get(f"http://127.0.0.1:{port}{path}", timeout=WAIT, **options)
    is_json = answer.headers["Content-Type"] == "application/json"
    return answer.status_code, answer.json() if is_json else answer.text


def send(path, port=PORT):
    """Send a request and return its connection; to close it is to leave."""
    client = socket.create_connection(("127.0.0.1", port))
    client.sendall(f"GET {path} HTTP/1.0\r\n\r\n".encode())
    return client


class AppTest(TestCase):
    def setUp(self):
        upstream.reply = echo
        ALL_FOUR.reset()


class ViewsTest(AppTest):
    def test_magic_has_all_four_fetches_in_flight_and_keeps_their_order(self):
        upstream.reply = last_first
        self.assertEqual(get("/magic"), OK)

    def test_index_has_one_fetch_in_flight_and_both_views_let_others_be_answered(self):
        def ask_the_app(fetch):
            events.append(fetch.number)
            events.append(get("/nowhere")[0])
            return echo(fetch)

        upstream.reply, events = ask_the_app, []
        self.assertEqual(get("/"), OK)
        self.assertEqual(events, ["1", 404, "2", 404, "3", 404, "4", 404])
        self.assertEqual(get("/magic"), OK)  # if it blocked the loop: no 404, not OK

    def test_one_failed_fetch_fails_magic_and_closes_the_others(self):
        def third_hangs_up(fetch):
            ALL_FOUR.wait()
            if fetch.number != "3":
                stall(fetch)
                closed.put(fetch.number)
            return b""

        upstream.reply, closed = third_hangs_up, Queue()
        self.assertEqual(get("/magic"), SERVER_ERROR)
        self.assertEqual({closed.get(timeout=WAIT) for _ in range(3)}, {"1", "2", "4"})

    def test_a_client_that_leaves_magic_takes_its_fetches_along(self):
        def note(fetch):
            events.put("came")
            stall(fetch)
            events.put("closed")
            return b""

        upstream.reply, events = note, Queue()
        with self.assertNoLogs(level="ERROR"), send("/magic") as client:
            came = [events.get(timeout=WAIT) for _ in range(4)]
            client.close()
            closed = [events.get(timeout=WAIT) for _ in range(4)]
        self.assertEqual(came + closed, ["came"] * 4 + ["closed"] * 4)

    def test_a_client_that_leaves_index_does_not_stop_its_fetches(self):
        def wait_until_it_left(fetch):
            came.put(fetch.number)
            left.wait(WAIT)
            return echo(fetch)

        upstream.reply, came, left = wait_until_it_left, Queue(), Event()
        with send("/"):
            self.assertEqual(came.get(timeout=WAIT), "1")
        get("/nowhere")  # answered after the server saw the client leave
        left.set()
        self.assertEqual([came.get(timeout=WAIT) for _ in range(3)], ["2", "3", "4"])

    def test_nothing_of_a_visitor_or_a_reply_reaches_the_upstream(self):
        def set_cookie(fetch):
            seen.append(f"{fetch.requestline}\n{fetch.headers}")
            return echo(fetch).replace(b"OK\r\n", b"OK\r\nSet-Cookie: name=secret\r\n")

        upstream.reply, seen = set_cookie, []
        names = "Authorization", "Cookie", "User-Agent", "X-Any"
        visitor = {"headers": dict.fromkeys(names, "secret"), "data": "secret"}
        for path in ("/?secret", "/magic?secret") * 2:  # again: no cookie is kept
            self.assertEqual(get(path, **visitor), OK)
        self.assertEqual(len(seen), 16)
        self.assertNotRegex("".join(seen), "secret|Content-Length")

    def test_both_views_follow_redirects(self):
        def redirect(fetch):
            moved = f"HTTP/1.0 302 Found\r\nLocation: /{fetch.number}\r\n\r\n".encode()
            return moved if "/get" in fetch.path else echo(fetch)

        upstream.reply = redirect
        self.assertEqual([get("/"), get("/magic")], [OK, OK])

    def test_one_bad_reply_is_a_500_and_the_next_request_works(self):
        def third_is_bad(fetch):
            return BAD_REPLIES[name] if fetch.number == "3" else echo(fetch)

        for name in BAD_REPLIES:
            with self.subTest(name):
                upstream.reply = third_is_bad
                self.assertEqual([get("/"), get("/magic")], [SERVER_ERROR] * 2)
                upstream.reply = echo
                self.assertEqual([get("/"), get("/magic")], [OK, OK])

    def test_an_upstream_that_stalls_longer_than_timeout_is_a_500(self):
        self.assertTrue(4 * app.LATENCY < app.TIMEOUT < 60)  # 4: in README, change 4
        upstream.reply = stall
        with patch.object(app, "TIMEOUT", 0.2):
            self.assertEqual([get("/"), get("/magic")], [SERVER_ERROR, SERVER_ERROR])

    def test_an_untrusted_certificate_is_a_500(self):
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        context.load_cert_chain(PEM)
        tls = ThreadingTCPServer(("127.0.0.1", 0), Fetch)
        tls.socket = context.wrap_socket(tls.socket, server_side=True)
        Thread(target=tls.serve_forever, daemon=True).start()
        port = tls.server_address[1]
        urls = [f"https://127.0.0.1:{port}/get?test={n}" for n in "1234"]
        with patch.object(app, "urls", urls):
            self.assertEqual([get("/"), get("/magic")], [SERVER_ERROR, SERVER_ERROR])
            self.assertTrue(app.SSL_CONTEXT.check_hostname)
            trust = ssl.create_default_context(cafile=PEM)
            bundle = patch.dict(os.environ, REQUESTS_CA_BUNDLE=str(PEM))
            with patch.object(app, "SSL_CONTEXT", trust), bundle:
                self.assertEqual([get("/"), get("/magic")], [OK, OK])

    def test_debug_shows_djangos_page(self):  # which needs a SECRET_KEY
        upstream.reply = lambda fetch: b""
        with override_settings(DEBUG=True):
            self.assertIn("<title>RemoteProtocolError", get("/magic")[1])


class StandInTest(AppTest):
    def test_it_echoes_four_queries_at_once(self):
        urls = [url + "&name=Ada" for url in STAND_IN_URLS]
        meet = patch("time.sleep", lambda seconds: ALL_FOUR.wait())
        with patch.object(app, "urls", urls), meet:
            results = get("/magic")[1]["result"]
        self.assertEqual(results, [{"test": n, "name": "Ada"} for n in "1234"])

    def test_it_is_on_this_machine_alone(self):
        self.assertEqual(app.server.server_address[0], "127.0.0.1")
        self.assertIn("//127.0.0.1:", STAND_IN_URLS[0])  # Windows is slow at localhost

    def test_it_lets_100_connections_wait(self):
        self.assertIsInstance(app.server, app.Server)
        with app.Server(("127.0.0.1", 0), app.StandIn) as idle:  # accepts none of them
            for _ in range(100):
                self.addCleanup(socket.create_connection(idle.server_address, 1).close)

    def test_it_prints_no_traceback_when_its_client_has_left(self):
        client, connection = socket.socketpair()
        client.sendall(b"GET /get HTTP/1.0\r\n\r\n")
        with connection, patch("time.sleep", lambda seconds: client.close()):
            app.StandIn(connection, "client", app.server)  # raises no ConnectionError


class CommandsTest(AppTest):
    def pasted(self, code, settings=""):
        """Return app.py with code pasted above `if __name__`, and more settings."""
        source = SOURCE
        for place, text in ("    ROOT_URLCONF", settings), ("if __name__", code):
            self.assertEqual(source.count(place), 1, place)
            source = source.replace(place, text + place)
        return source

    def start(self, source, command=UVICORN):
        """Start python beside an app.py with this source; return it and its port."""
        self.folder = TemporaryDirectory()
        Path(self.folder.name, "app.py").write_text(source, "utf-8")
        python = [sys.executable, "-u", *command]
        env = os.environ | DEAD_PROXIES  # a fetch through these fails: app uses none
        child = Popen(python, cwd=self.folder.name, env=env, stdout=PIPE, stderr=STDOUT)
        limit = Timer(20, child.kill)
        limit.start()
        self.addCleanup(self.folder.cleanup)  # runs last
        self.addCleanup(child.communicate)
        self.addCleanup(child.kill)
        self.addCleanup(limit.cancel)
        terminal = b""
        for line in child.stdout:
            terminal += line
            if address := re.search(rb"http://127.0.0.1:(\d+)", line):
                return child, int(address[1])
        raise AssertionError(f"it does not serve:\n{terminal.decode()}")

    def test_uvicorn_and_runserver_serve_both_views_and_print_their_fetches(self):
        for command in UVICORN, RUNSERVER:
            child, port = self.start(self.pasted("LATENCY = 0\n"), command)
            for path in "/", "/magic", "/", "/magic":  # twice: a kept AsyncClient fails
                self.assertEqual(get(path, port), OK)
            child.kill()
            self.assertEqual(child.stdout.read().count(b'"GET /get?test='), 16)

    @skipIf(os.name == "nt", "no SIGINT to send")
    def test_ctrl_c_does_not_wait_for_the_stand_in(self):  # which prints, then waits
        child, port = self.start(self.pasted("LATENCY = 60\n"))
        with send("/magic", port):
            fetched = any(b'"GET /get?test=4' in line for line in child.stdout)
            self.assertTrue(fetched, "it ended before it fetched")
        child.send_signal(signal.SIGINT)
        child.wait(WAIT)  # raises an error if it goes on

    def test_an_error_shows_its_traceback_in_the_terminal_alone(self):
        source = self.pasted("urls = ['http://127.0.0.1:1/']\n")
        for command in UVICORN, RUNSERVER:
            child, port = self.start(source, command)
            self.assertEqual([get("/", port), get("/magic", port)], [SERVER_ERROR] * 2)
            child.kill()
            terminal = child.stdout.read()
            for error in b"requests.exceptions.ConnectionError", b"httpx.ConnectError":
                self.assertEqual(terminal.count(b"\n" + error + b": "), 1)

    def test_uvicorn_starts_without_dns(self):  # an HTTPServer would call getfqdn
        self.start(NO_DNS + SOURCE)

    def test_magic_takes_one_wait_of_1_5_seconds(self):
        self.assertEqual(app.LATENCY, 1.5)  # as README says
        _, port = self.start(SOURCE)
        start = monotonic()
        self.assertEqual(get("/magic", port), OK)
        self.assertTrue(1.5 <= monotonic() - start < 3)

    def test_the_code_in_readme_works_when_pasted(self):
        upstream.reply = last_first
        source = self.pasted(f"urls = {URLS}\n{PASTED}", SETTINGS)
        _, port = self.start(source)
        migrate = [sys.executable, "app.py", "migrate"]
        run(migrate, cwd=self.folder.name, check=True, stdout=PIPE, timeout=20)
        self.assertEqual(get("/threads", port), OK)
        self.assertEqual(get("/site", port), (200, {"name": "example.com"}))


class CopiesTest(TestCase):
    def test_readme_shows_the_two_views_as_they_are(self):
        views = SOURCE[SOURCE.index("def index") : SOURCE.index("\n\ndef answer")]
        self.assertEqual(VIEWS, views, "copy them again")

    def test_three_places_name_the_same_packages(self):
        required = (HERE / "requirements.txt").read_text().split()
        block = "# /// script\n# requires-python = .*\n# dependencies = (.*)\n# ///\n"
        self.assertEqual(json.loads(re.search(block, SOURCE)[1]), required)
        names = [re.match("[a-z]+", line)[0] for line in required]
        self.assertIn(f"install {' '.join(names)}\n    uvicorn app:app", app.__doc__)
