"""Two Django views fetch the same four URLs: / one after another, /magic all at once.

    pip install django httpx requests uvicorn
    uvicorn app:application                # or, without pip: uv run app.py runserver
    time curl http://127.0.0.1:8000/       # 6 s: four waits of 1.5 s
    time curl http://127.0.0.1:8000/magic  # 1.5 s: the four waits at once

No network is needed: a small server in this file stands in for httpbin.org.
"""

# /// script
# requires-python = ">=3.10"  # `uv run` reads this block
# dependencies = ["django>=5.2", "httpx>=0.28,<1", "requests>=2.32", "uvicorn>=0.30"]
# ///
import asyncio
import json
import logging
import os
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler
from socketserver import ThreadingTCPServer
from urllib.parse import parse_qsl, urlsplit

import httpx
import requests
from django.conf import settings
from django.core.asgi import get_asgi_application
from django.core.management import execute_from_command_line
from django.http import JsonResponse
from django.urls import path

LATENCY = 1.5  # seconds that the stand-in server waits before it answers
TIMEOUT = 10  # seconds without data before a fetch fails
# Loaded once; else each AsyncClient loads TLS certificates (20 ms), even for http.
CERTIFICATES = httpx.create_ssl_context()

# `urls` are four URLs, set below. requests has no async client; httpx has one.


def index(request):
    """Fetch one after another: takes the sum of the four times."""
    responses = [requests.get(url, timeout=TIMEOUT) for url in urls]
    return answer(responses)


async def magic(request):
    """Fetch all at once: takes as long as the slowest."""
    async with httpx.AsyncClient(timeout=TIMEOUT, verify=CERTIFICATES) as client:
        fetches = [client.get(url) for url in urls]  # coroutines: nothing is sent yet
        responses = await asyncio.gather(*fetches)  # runs them all, keeps their order
    return answer(responses)


def answer(responses):
    """Return every response's "args" as JSON, or raise if a response is an error."""
    for response in responses:
        response.raise_for_status()
    return JsonResponse({"result": [response.json()["args"] for response in responses]})


class StandIn(BaseHTTPRequestHandler):
    """Echoes the query as "args", like httpbin.org/get, but LATENCY seconds later."""

    def do_GET(self):
        self.log_request()  # prints a line: 1.5 s apart for /, together for /magic
        args = dict(parse_qsl(urlsplit(self.path).query))
        time.sleep(LATENCY)
        body = json.dumps({"args": args})
        # In one write: if the client has left, only a second write raises an error.
        self.wfile.write(f"HTTP/1.0 200 OK\r\n\r\n{body}".encode())


# HTTPServer would look up its host in DNS: half a minute on some networks.
server = ThreadingTCPServer(("127.0.0.1", 0), StandIn)  # 0: any free port
server.daemon_threads = True  # else Ctrl-C waits for threads that still sleep
server.socket.listen(1024)  # again: with its own queue of 5, many fetches at once fail
threading.Thread(target=server.serve_forever, daemon=True).start()
port = server.server_address[1]
urls = [f"http://127.0.0.1:{port}/get?test={n}" for n in (1, 2, 3, 4)]
os.environ["no_proxy"] = "*"  # else HTTP_PROXY applies; to use a proxy, remove this


def handler500(request):
    """Django calls this for an uncaught exception: 502 if a fetch failed, else 500."""
    error = sys.exc_info()[1]  # set by Django's except block, also for async views
    log = logging.getLogger(__name__)
    fetch_errors = requests.RequestException, httpx.HTTPError, json.JSONDecodeError
    if isinstance(error, fetch_errors):
        log.error("502 for %r: %r", request.path, error)
        return JsonResponse({"error": "Bad Gateway"}, status=502)
    log.exception("500 for %r", request.path)  # Django shows no traceback without DEBUG
    return JsonResponse({"error": "Internal Server Error"}, status=500)


settings.configure(  # in place of a settings.py
    ROOT_URLCONF=__name__,  # urlpatterns and handler500 are in this file
    ALLOWED_HOSTS=["*"],  # else runserver does not start
    SECRET_KEY=os.urandom(32),  # the debug page needs it, if you add DEBUG=True
)
urlpatterns = [path("", index), path("magic", magic)]
application = get_asgi_application()
if __name__ == "__main__":  # `uv run app.py runserver` needs this
    execute_from_command_line()
