# /// script
# requires-python = ">=3.10"
# dependencies = ["django>=5.2", "httpx>=0.28,<1", "requests>=2.32.3",
#                 "sniffio>=1.3", "uvicorn[standard]>=0.32"]
# ///
"""Fetch four URLs one after another, at / (6 s), or all at once, at /magic (1.5 s).

Install and run:
    pip install "django>=5.2" "httpx<1" requests sniffio "uvicorn[standard]"
    uvicorn app:application
"""

import asyncio
import json
import logging
import os
import socket
import sys
import threading
from contextlib import suppress

import httpx
import requests
from django.conf import settings
from django.core.asgi import get_asgi_application
from django.core.management import execute_from_command_line
from django.http import JsonResponse
from django.urls import path
from uvicorn import Config, Server

LATENCY = float(os.environ.get("LATENCY", "1.5"))  # seconds that the stand-in waits
UPSTREAM = os.environ.get("UPSTREAM")  # URL to fetch, instead of the stand-in's
TIMEOUT = 10  # seconds to wait for a connection, and for each next byte
TLS = httpx.create_ssl_context()  # once: it reads every certificate, and blocks


def index(request):
    """Fetch one after another: the answer takes the sum of the four times."""
    responses = [requests.get(url, timeout=TIMEOUT) for url in urls]
    return answer(responses)


async def magic(request):
    """Fetch all at once: the answer takes the longest of the four times."""
    async with httpx.AsyncClient(verify=TLS, timeout=TIMEOUT) as client:
        fetches = [client.get(url, follow_redirects=True) for url in urls]
        responses = await asyncio.gather(*fetches)
    return answer(responses)


def answer(responses):
    """Return the args of responses of either library; in Server-Timing, their ms."""
    result, times = [], []
    for n, response in enumerate(responses, 1):
        if response.status_code != 200:
            raise requests.HTTPError(response.status_code, response=response)
        try:  # from bytes, as the libraries decode differently; ** takes only an object
            result.append({**json.loads(response.content)["args"]})
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise requests.HTTPError(error, response=response)
        times.append(f"get{n};dur={response.elapsed.total_seconds() * 1000:.1f}")
    return JsonResponse({"result": result}, headers={"Server-Timing": ", ".join(times)})


async def get(request):
    """Stand in for httpbin's /get: wait LATENCY seconds, then return the query."""
    await asyncio.sleep(LATENCY)
    return JsonResponse({"args": request.GET.dict()})


def start_stand_in():
    """Serve this file again in an event loop of its own; return the URL of its /get."""
    os.environ["no_proxy"] = "*"  # both libraries read it, and no proxy leads here
    listener = socket.create_server(("127.0.0.1", 0))
    server = Server(Config(application, lifespan="off", log_config=None))
    threading.Thread(target=server.run, args=[[listener]], daemon=True).start()
    return f"http://127.0.0.1:{listener.getsockname()[1]}/get"


def four(upstream):
    """Return four URLs, the upstream's with ?test=1 to ?test=4, or end the program."""
    with suppress(httpx.InvalidURL, ValueError):
        url = httpx.URL(upstream)
        if url.host and url.scheme in ("http", "https"):
            return [str(url.copy_add_param("test", n)) for n in (1, 2, 3, 4)]
    sys.exit("UPSTREAM must be an http or https URL with a host")


def handler500(request):
    """Answer for a view that raised: 504 or 502 if its upstream failed, else 500."""
    error = cause = sys.exc_info()[1]
    match error:
        case requests.HTTPError():
            status, kind = 502, f"status {error.response.status_code}, no httpbin JSON"
        case requests.RequestException() | httpx.HTTPError() | httpx.InvalidURL():
            status, kind = 502, "no complete answer"
        case _:
            log.exception("500 for %s", request.path)
            return JsonResponse({"error": "Internal Server Error"}, status=500)
    while cause := cause.__context__:  # either library may wrap a timeout
        if isinstance(cause, TimeoutError):
            status, kind = 504, f"no answer within {TIMEOUT} s"
    url = getattr(getattr(error, "request", None), "url", urls)
    url = requests.utils.urldefragauth(str(url))  # without the password
    log.error("%s for %s: %.400r from %s", status, request.path, error, url)
    return JsonResponse({"error": f"upstream: {kind}"}, status=status)


log = logging.getLogger(__name__)
settings.configure(
    ROOT_URLCONF=__name__,
    ALLOWED_HOSTS=["*"],  # runserver asks for it; no code here reads the Host header
)
urlpatterns = [path("", index), path("magic", magic), path("get", get)]
application = get_asgi_application()
urls = four(UPSTREAM or start_stand_in())

if __name__ == "__main__":
    execute_from_command_line(sys.argv)
