"""Two views fetch the same four URLs, / one after another and /magic all at once.

    pip install django httpx requests uvicorn
    uvicorn app:application                # then, in a second terminal:
    time curl http://127.0.0.1:8000/       # 6 s: four waits of 1.5 s
    time curl http://127.0.0.1:8000/magic  # 1.5 s: the four waits at once

No network is needed for the fetches: they go to a small server in this file."""

import asyncio
import json
import os
import threading
import time
from contextlib import suppress
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

LATENCY = 1.5  # seconds that the small server waits before it replies
TIMEOUT = 10  # seconds without data before a fetch fails
SSL_CONTEXT = httpx.create_ssl_context()  # slow; every client needs one, even for http


# The two views, as uvicorn runs them. The four `urls` are set further down.
def index(request):  # each visit has a thread of its own
    """Fetch one after another: the four waits add up."""
    responses = [requests.get(url, timeout=TIMEOUT) for url in urls]
    return answer(responses)


async def magic(request):  # an event loop runs all async views in turns, in one thread
    """Fetch all at once: only the longest wait counts."""
    # requests.get would block the thread: 6 s again, and all other visits would wait.
    async with httpx.AsyncClient(timeout=TIMEOUT, verify=SSL_CONTEXT) as client:
        # (requests follows redirects unasked, httpx does not.)
        # These calls return coroutines, which have not begun: nothing is sent yet.
        fetches = [client.get(url, follow_redirects=True) for url in urls]
        # gather schedules all four; await pauses magic, so the event loop can run them:
        # each sends its request and pauses until the operating system reports a reply.
        # Results keep the order of urls. If a fetch raises an error, so does this line.
        responses = await asyncio.gather(*fetches)
    return answer(responses)


def answer(responses):
    """Return a JSON response of all "args"; raise if a response is an error."""
    for response in responses:
        response.raise_for_status()
    return JsonResponse({"result": [response.json()["args"] for response in responses]})


# End of the lesson. The threads below play a remote server; no view runs in them.
class StandIn(BaseHTTPRequestHandler):
    """Replies like httpbin.org/get: with JSON that has the query as "args"."""

    def do_GET(self):
        self.send_response(200)  # prints a line in the terminal, four at once for magic
        args = dict(parse_qsl(urlsplit(self.path).query))
        time.sleep(LATENCY)  # each fetch has a thread here
        with suppress(ConnectionError):  # the client may have left
            self.end_headers()  # sends the 200
            self.wfile.write(json.dumps({"args": args}).encode())


class Server(ThreadingTCPServer):  # HTTPServer looks up a name: slow on some networks
    daemon_threads = True  # else Ctrl-C may wait for threads that still sleep
    request_queue_size = 1024  # else the fetches of many visitors at once stall or fail


server = Server(("127.0.0.1", 0), StandIn)  # 0: any free port
threading.Thread(target=server.serve_forever, daemon=True).start()
urls = [f"http://127.0.0.1:{server.server_address[1]}/get?test={n}" for n in "1234"]
os.environ["no_proxy"] = "*"  # no proxy in this process; delete if your urls need one

# Django, in place of a settings.py, urls.py, asgi.py and manage.py.
settings.configure(
    ROOT_URLCONF=__name__,  # urlpatterns is in this file
    ALLOWED_HOSTS=["127.0.0.1", "localhost"],  # else runserver does not start
    SECRET_KEY=os.urandom(32),  # needed if you set DEBUG=True
    LOGGING_CONFIG=None,  # prints errors even without DEBUG; LOGGING is then ignored
)
urlpatterns = [path("", index), path("magic", magic)]
application = get_asgi_application()

# With uv (0.8.16 or later): uv run --with-requirements app.py uvicorn app:application
# /// script
# requires-python = ">=3.10"  # uv reads these lines
# dependencies = ["django>=5.2", "httpx>=0.28,<1", "requests>=2.32.2", "uvicorn>=0.30"]
# ///
if __name__ == "__main__":  # python app.py runserver
    execute_from_command_line()
