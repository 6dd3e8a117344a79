"""The page of all routes."""

import re

import httpx


def test_it_tells_of_every_route_and_loads_nothing(http: httpx.Client) -> None:
    page = http.get("/docs")
    assert page.headers["content-type"].startswith("text/html")
    for path in http.get("/openapi.json").json()["paths"]:
        assert path in page.text
    assert not re.search(r"<(script|link|img|iframe)|src=|@import", page.text)
