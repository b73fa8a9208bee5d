"""Tests of app.py: a real uvicorn serves it, in a thread of this process.

The app's urls lead to the upstream below. A fetch waits there until as many have come
as upstream.barrier wants (1, unless a test says), then gets upstream.reply(fetch)."""

import os
import re
import signal
import socket
import sys
import tempfile
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from socketserver import ThreadingTCPServer
from ssl import Purpose, create_default_context
from subprocess import PIPE, STDOUT, Popen
from threading import Barrier, Thread
from time import sleep
from unittest import TestCase
from unittest.mock import Mock, patch

import requests
import uvicorn
from django.test import override_settings

import app

HERE = Path(__file__).parent
SOURCE, README = [(HERE / f).read_text("utf-8") for f in ("app.py", "README.md")]
VIEWS, PASTED = re.findall("(?s)```python\n(.*?)```", README)
SETTINGS = re.search("(?s)```text\n(    INSTALLED_APPS.*?)```", README)[1]
LOGGING = "    LOGGING={'version': 1},\n"  # disables each logger that is older
PEM = str(HERE / ".ci" / "127.0.0.1.pem")  # a self-signed certificate and its key
UVICORN = "-m", "uvicorn", "app:application", "--port", "0"  # 0: any free port
RUNSERVER = "app.py", "runserver", "--noreload", "0"
MIGRATE_AND_SERVE = """from app import *; execute_from_command_line(["", "migrate"])
import uvicorn; logging.basicConfig(level="INFO")
uvicorn.run(application, port=0, log_config=None)"""
DEAD_PROXIES = {"http_proxy": "http://127.0.0.1:1", "ALL_PROXY": "socks://127.0.0.1:1"}
OK = 200, b'{"result": [{"test": "1"}, {"test": "2"}, {"test": "3"}, {"test": "4"}]}'
BAD_GATEWAY = 502, b'{"error": "Bad Gateway"}'
SERVER_ERROR = 500, b'{"error": "Internal Server Error"}'
WAIT = 4  # seconds; httpx waits 5 by default, so a forgotten TIMEOUT fails
HTTP_OK = b"HTTP/1.0 200 OK\r\n\r\n"
BAD_REPLIES = {
    "hangs up": b"",
    "breaks off": b'HTTP/1.0 200 OK\r\nContent-Length: 99\r\n\r\n{"args": {}}',
    "is no HTTP": b"220 ftp.example.org\r\n",
    "is a 404": b'HTTP/1.0 404 Not Found\r\n\r\n{"args": {}}',
    "is no JSON": HTTP_OK + b"<h1>Hello</h1>",
}


class Fetch(BaseHTTPRequestHandler):  # one fetch of the app, as the upstream sees it
    def do_GET(self):
        self.barrier = upstream.barrier  # kept for stall: the next test sets another
        upstream.fetches.append(self.requestline + str(self.headers))
        self.barrier.wait(WAIT)
        self.wfile.write(upstream.reply(self))


def echo(fetch):  # replies as httpbin's /get does
    return HTTP_OK + b'{"args": {"test": "%c"}}' % ord(fetch.path[-1])


def stall(fetch):
    """Send nothing until the app closes the connection, then meet at the barrier."""
    fetch.connection.settimeout(WAIT)
    fetch.rfile.read()
    fetch.barrier.wait(WAIT)
    return b""


upstream = ThreadingTCPServer(("127.0.0.1", 0), Fetch)
URLS = [f"http://127.0.0.1:{upstream.server_address[1]}/get?test={n}" for n in "1234"]
STAND_IN_URLS = app.urls  # to the server that app.py itself starts
listener = socket.create_server(("127.0.0.1", 0))
PORT = listener.getsockname()[1]
server = uvicorn.Server(uvicorn.Config(app.application, log_config=None))


def setUpModule():
    signal.signal(signal.SIGINT, signal.default_int_handler)  # even if ignored at start
    patch.object(app, "urls", URLS).start()
    Thread(target=upstream.serve_forever, daemon=True).start()
    Thread(target=server.run, args=[[listener]], daemon=True).start()


def get(path, port=PORT, **options):
    answer = requests.get(f"http://127.0.0.1:{port}{path}", timeout=WAIT, **options)
    return answer.status_code, answer.content


def send(path, port=PORT):  # returns the connection; to leave is to close it
    client = socket.create_connection(("127.0.0.1", port))
    client.sendall(f"GET {path} HTTP/1.0\r\n\r\n".encode())
    return client


class AppTest(TestCase):
    def setUp(self):
        upstream.reply, upstream.barrier, upstream.fetches = echo, Barrier(1), []
        app.StandIn.log_message = Mock()

    def test_nothing_of_the_request_reaches_the_upstream(self):
        headers = {"Cookie": "secret", "Authorization": "secret", "X-Any": "secret"}
        get("/?secret", headers=headers)
        get("/magic?secret", headers=headers)
        self.assertEqual(len(upstream.fetches), 8)
        self.assertNotIn("secret", str(upstream.fetches))

    def test_magic_has_all_four_fetches_in_flight_and_keeps_their_order(self):
        upstream.barrier = Barrier(4)  # all meet there; then the last is answered first
        upstream.reply = lambda fetch: sleep(0.1 / int(fetch.path[-1])) or echo(fetch)
        self.assertEqual(get("/magic"), OK)

    def test_index_has_one_fetch_in_flight_while_the_server_answers_others(self):
        def ask_the_app(fetch):
            events.append(fetch.path[-1])
            events.append(get("/nowhere")[0])
            return echo(fetch)

        upstream.reply, events = ask_the_app, []
        self.assertEqual(get("/"), OK)
        self.assertEqual(events, ["1", 404, "2", 404, "3", 404, "4", 404])

    def test_one_failed_fetch_fails_magic_and_closes_the_others(self):
        upstream.barrier = Barrier(4)
        upstream.reply = lambda fetch: b"" if fetch.path[-1] == "3" else stall(fetch)
        with self.assertLogs("app"):
            self.assertEqual(get("/magic"), BAD_GATEWAY)
        upstream.barrier.wait(WAIT)  # four again: those closed, and this test

    def test_a_client_that_leaves_magic_takes_its_fetches_along(self):
        upstream.reply, upstream.barrier = stall, Barrier(5)
        with self.assertNoLogs(level="WARNING"):
            with send("/magic"):
                upstream.barrier.wait(WAIT)  # the four come, and this test
            upstream.barrier.wait(WAIT)  # the four are closed

    def test_a_client_that_leaves_index_does_not_stop_its_fetches(self):
        upstream.barrier = Barrier(2)  # one fetch and this test
        with send("/"):
            upstream.barrier.wait(WAIT)
        get("/nowhere")  # this answer comes after the server saw the client leave
        for _ in range(3):
            upstream.barrier.wait(WAIT)  # raises an error unless the next fetch comes

    def test_a_bad_reply_is_a_502_and_one_line_in_the_terminal(self):
        for name, bad_reply in BAD_REPLIES.items():
            with self.subTest(name), self.assertLogs("app", "ERROR") as logs:
                upstream.reply = Mock(return_value=bad_reply)
                self.assertEqual([get("/"), get("/magic")], [BAD_GATEWAY, BAD_GATEWAY])
                upstream.reply = echo
                self.assertEqual([get("/"), get("/magic")], [OK, OK])
                self.assertRegex("\n".join(logs.output), "^.+'/': .+\n.+'/magic': .+$")

    def test_an_upstream_that_stalls_longer_than_timeout_is_a_502(self):
        upstream.reply = stall
        self.assertEqual(app.TIMEOUT, 10)
        with patch.object(app, "TIMEOUT", 0.5), self.assertLogs("app"):
            self.assertEqual([get("/"), get("/magic")], [BAD_GATEWAY, BAD_GATEWAY])

    def test_an_untrusted_certificate_is_a_502(self):
        context = create_default_context(Purpose.CLIENT_AUTH)
        context.load_cert_chain(PEM)
        tls = context.wrap_socket(upstream.socket.dup(), server_side=True)
        urls = patch.object(app, "urls", [url.replace("http", "https") for url in URLS])
        trust = patch.object(app, "CERTIFICATES", create_default_context(cafile=PEM))
        with tls, urls, patch.object(upstream, "socket", tls), self.assertLogs("app"):
            self.assertEqual([get("/"), get("/magic")], [BAD_GATEWAY, BAD_GATEWAY])
            with trust, patch.dict(os.environ, REQUESTS_CA_BUNDLE=PEM):
                self.assertEqual([get("/"), get("/magic")], [OK, OK])

    def test_any_other_exception_is_a_500_with_a_traceback_in_the_terminal(self):
        upstream.reply = lambda fetch: HTTP_OK + b"{}"
        with self.assertLogs("app", "ERROR") as logs:
            self.assertEqual([get("/"), get("/magic")], [SERVER_ERROR, SERVER_ERROR])
        self.assertEqual("".join(logs.output).count("\nKeyError: 'args'"), 2)
        with override_settings(DEBUG=True), self.assertLogs("django.request"):
            self.assertIn(b"<title>KeyError", get("/magic")[1])

    def test_the_stand_in_echoes_four_queries_at_once_after_latency_seconds(self):
        four = Barrier(4, app.StandIn.log_message.assert_called)  # they print first
        patched = patch("time.sleep", side_effect=lambda seconds: four.wait(WAIT))
        with patched as slept, patch.object(app, "urls", STAND_IN_URLS):
            self.assertEqual(get("/magic"), OK)
        slept.assert_called_with(1.5)

    def test_the_stand_in_is_on_127_0_0_1_alone(self):
        self.assertEqual(app.server.server_address[0], "127.0.0.1")
        self.assertIn("//127.0.0.1:", STAND_IN_URLS[0])  # Windows is slow at localhost

    def test_the_stand_in_does_not_make_ctrl_c_wait(self):
        self.assertTrue(app.server.daemon_threads)

    def test_the_stand_in_lets_100_connections_wait(self):
        app.server.shutdown()  # nobody accepts now: they wait in the queue
        self.addCleanup(Thread(target=app.server.serve_forever, daemon=True).start)
        for _ in range(100):
            self.addCleanup(socket.create_connection(("127.0.0.1", app.port), 1).close)

    def test_the_stand_in_prints_no_traceback_when_its_client_has_left(self):
        with socket.create_server(("127.0.0.1", 0)) as other:
            client = send("/get", other.getsockname()[1])
            connection, address = other.accept()
        with connection, patch("time.sleep", lambda seconds: client.close()):
            app.StandIn(connection, address, app.server)  # raises no BrokenPipeError

    def start(self, *command, source=SOURCE):
        """Start python with LATENCY = 0 and dead proxies; return it and its port."""
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        Path(folder.name, "app.py").write_text(source.replace("= 1.5", "= 0"))
        env = os.environ | {"no_proxy": ""} | DEAD_PROXIES
        python = [sys.executable, "-u", *command]
        child = Popen(python, cwd=folder.name, env=env, stdout=PIPE, stderr=STDOUT)
        self.addCleanup(child.communicate)
        self.addCleanup(child.kill)
        for line in child.stdout:
            if address := re.search(rb"http://127.0.0.1:(\d+)", line):
                return child, int(address[1])
        return self.fail(line)  # the last line says why it ended

    def test_uvicorn_and_runserver_serve_both_views_and_print_their_fetches(self):
        """Each twice: under runserver, an httpx client that is kept would fail."""
        for command in UVICORN, RUNSERVER:
            child, port = self.start(*command)
            for path in "/", "/magic", "/", "/magic":
                self.assertEqual(get(path, port), OK)
            child.send_signal(signal.SIGINT)
            child.wait(WAIT)  # raises an error unless Ctrl-C ends it
            self.assertEqual(child.stdout.read().count(b"GET /get?test="), 16)

    def test_app_py_starts_without_dns(self):  # HTTPServer would call getfqdn
        cut = "import socket as s; del s.getfqdn, s.getaddrinfo, s.gethostbyname; "
        self.start("-c", cut + "import uvicorn; uvicorn.run('app:application', port=0)")

    def test_the_code_in_readme_does_what_readme_says(self):
        source = re.sub("(?m)^urls = .*", f"urls = {URLS}", SOURCE)
        source = source.replace("if __name__", PASTED + "if __name__")
        source = source.replace("    ROOT", SETTINGS + LOGGING + "    ROOT")
        upstream.barrier = Barrier(4)
        child, port = self.start("-c", MIGRATE_AND_SERVE, source=source)
        self.assertEqual(get("/threads", port), OK)
        self.assertEqual(get("/site", port), (200, b'{"name": "example.com"}'))
        upstream.reply = Mock(return_value=b"")
        self.assertEqual(get("/magic", port), BAD_GATEWAY)
        child.kill()
        self.assertIn(b"502 for '/magic': RemoteProtocolError(", child.stdout.read())

    def test_readme_shows_the_two_views_as_they_are(self):
        self.assertTrue(VIEWS in SOURCE, "copy them again")

    def test_three_places_name_the_same_four_packages(self):
        required = (HERE / "requirements.txt").read_text()
        block = re.search("requires-python.*\n# dependencies = (.*)\n# ///\n", SOURCE)
        self.assertEqual(block[1].replace('"', "'"), str(required.split()))
        names = " ".join(re.findall("(?m)^[a-z]+", required))
        self.assertIn(f"pip install {names}\n    uvicorn app:application ", app.__doc__)
