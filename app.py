"""Two Django views fetch the same four URLs: / one after another, /magic all at once.

    pip install django httpx requests uvicorn
    uvicorn app:application                # then, in a second terminal:
    time curl http://127.0.0.1:8000/       # 6 s: four waits of 1.5 s
    time curl http://127.0.0.1:8000/magic  # 1.5 s: the four waits at once

Once installed, it needs no network: the URLs lead to a small server in this file."""

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
SSL_CONTEXT = httpx.create_ssl_context()  # for https; to make it in each /magic is slow


# The two views. The four `urls` are set further down.
def index(request):  # in uvicorn, each request has a thread of its own
    """Fetch one after another: the four waits add up."""
    responses = [requests.get(url, timeout=TIMEOUT) for url in urls]
    return answer(responses)


async def magic(request):  # in uvicorn, all async views share one thread
    """Fetch all at once: only the longest wait counts."""
    # requests would hold that thread while it waits; httpx lets others use it.
    async with httpx.AsyncClient(timeout=TIMEOUT, verify=SSL_CONTEXT) as client:
        # httpx follows redirects only when told to, requests by itself.
        # Coroutines: nothing is sent yet. (`await` here would send one after another.)
        fetches = [client.get(url, follow_redirects=True) for url in urls]
        # gather starts all four: the thread's event loop runs whichever need not wait.
        # await pauses magic until all are done, or one fails; results are in order.
        responses = await asyncio.gather(*fetches)
    return answer(responses)


def answer(responses):
    """Answer with the "args" of all responses, as JSON; raise if one is an error."""
    for response in responses:
        response.raise_for_status()
    return JsonResponse({"result": [response.json()["args"] for response in responses]})


# End of the lesson. The threads below play the remote server; magic uses none of them.
class StandIn(BaseHTTPRequestHandler):
    """Replies like httpbin.org/get: with JSON that has the query as "args"."""

    def do_GET(self):
        self.send_response(200)  # only prints a line, four at once for /magic
        args = dict(parse_qsl(urlsplit(self.path).query))
        time.sleep(LATENCY)  # in a thread of its own
        with suppress(ConnectionError):  # the client may have left
            self.end_headers()  # sends the 200
            self.wfile.write(json.dumps({"args": args}).encode())


class Server(ThreadingTCPServer):  # HTTPServer looks up a name: slow on some networks
    daemon_threads = True  # else Ctrl-C also waits for threads that still sleep
    request_queue_size = 1024  # else the fetches of many visitors at once stall or fail


server = Server(("127.0.0.1", 0), StandIn)  # 0: any free port
threading.Thread(target=server.serve_forever, daemon=True).start()
urls = [f"http://127.0.0.1:{server.server_address[1]}/get?test={n}" for n in "1234"]
os.environ["no_proxy"] = "*"  # no proxy in this process; delete if your urls need one

# Django, in place of a settings.py, urls.py, asgi.py and manage.py.
settings.configure(
    ROOT_URLCONF=__name__,  # urlpatterns is in this file
    ALLOWED_HOSTS=["127.0.0.1", "localhost"],  # else runserver does not start
    SECRET_KEY=os.urandom(32),  # for DEBUG=True's error page; new at each start
    LOGGING_CONFIG=None,  # prints errors even without DEBUG; ignores a LOGGING setting
)
urlpatterns = [path("", index), path("magic", magic)]
application = get_asgi_application()

# Without pip, `uv run --with-requirements app.py uvicorn app:application` reads this:
# /// script
# requires-python = ">=3.10"
# dependencies = ["django>=5.2", "httpx>=0.28,<1", "requests>=2.32.2", "uvicorn>=0.30"]
# ///
if __name__ == "__main__":  # python app.py runserver: 6 s and 1.5 s, too
    execute_from_command_line()
