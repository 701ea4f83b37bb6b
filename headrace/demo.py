"""The demo's course: upload a made-up catalogue, ask it ten questions, write ten creatives, sum up."""

import contextlib
import secrets
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import msgspec

from cluster.catalogue.sample import sample_briefs, sample_csv
from headrace.catalogue_client import CatalogueClient, CatalogueError, Upload
from headrace.chat import ChatOptions, Conversation, Delta, Reply, new_session_id, printable
from headrace.demo_screen import Found, FoundItem, Screen, Totals, Written

NUM_QUESTIONS = 10
SHOWN_ITEMS = 5
CREATIVE_TOKENS = 40
_REQUEST_TIMEOUT = httpx.Timeout(120.0, connect=10.0)
_SYSTEM = "You write ads of one sentence."
_ASK = (
    "Spring sale, free delivery until Sunday. Write an advertisement of one sentence that tells a reader why "
    "to buy the {product}."
)
"""One campaign's: only the product differs."""


class DemoError(Exception):
    """The cluster cannot be shown; the message says what to do. Handled by the command line."""


class DemoOptions(msgspec.Struct, frozen=True, kw_only=True):
    http_url: str
    num_items: int
    seed: int
    keep: bool
    """The catalogue stays."""


def run(options: DemoOptions, screen: Screen) -> tuple[str, str]:
    """Returns the names of the model and of the catalogue.

    Raises DemoError, CatalogueError, ChatError. However it ends, the uploaded catalogue goes, but for `keep`.
    """
    with httpx.Client(base_url=options.http_url, timeout=_REQUEST_TIMEOUT) as http:
        model = _chat_model(http)
        screen.begin(model, options.http_url)
        catalogues = CatalogueClient(options.http_url, http)
        name = f"demo-{secrets.token_hex(3)}"
        upload: Upload | None = None
        try:
            upload = _upload(catalogues, name, options, screen)
            found = _ask_all(catalogues, model, upload, options.seed, screen)
            written = _write_all(http, model, found, options, screen)
        finally:
            if not options.keep:
                _delete(catalogues, name, screen, must_exist=upload is not None)
        screen.summary(Totals(upload=upload, found=tuple(found), written=tuple(written)))
        return model, name


def _chat_model(http: httpx.Client) -> str:
    """The served model, which has been made to answer a message. Raises DemoError."""
    try:
        listed = http.get("/v1/models")
        model = str(listed.raise_for_status().json()["data"][0]["id"])
        message = {"role": "user", "content": "Hello"}
        answer = http.post(
            "/v1/chat/completions", json={"model": model, "messages": [message], "max_tokens": 1}
        )
    except httpx.HTTPError as error:
        raise DemoError(
            f"{http.base_url} does not answer: {str(error) or type(error).__name__}; `headrace up` starts a "
            "cluster here, and so does the demo where it is given no --url and none is up"
        ) from None
    except (ValueError, KeyError, IndexError, TypeError):
        raise DemoError(f"{http.base_url}/v1/models lists no model: is that a cluster's address?") from None
    if answer.status_code != 200:
        raise DemoError(_why_no_chat(model, answer))
    return model


def _why_no_chat(model: str, answer: httpx.Response) -> str:
    error: dict[str, Any] = {}
    with contextlib.suppress(ValueError, KeyError, TypeError):
        error = dict(answer.json()["error"])
    if error.get("code") == "no_chat_template":
        return (
            f"{model} has no chat template, which the demo's creatives need: start the cluster with an "
            "instruct model, `headrace up --model ...`; the packaged one is such a model"
        )
    return f"{model} does not answer a message: {error.get('message') or answer.text[:500]}"


def _upload(catalogues: CatalogueClient, name: str, options: DemoOptions, screen: Screen) -> Upload:
    try:
        with tempfile.TemporaryDirectory(prefix="headrace-demo-") as folder:
            file = Path(folder) / "items.csv"
            with screen.uploading(options.num_items) as show:
                _make_items(file, options, show)
                upload = catalogues.put(file, name, skip_bad=False, on_progress=show)
    except OSError as error:
        raise DemoError(
            f"cannot keep the items in a temporary file: {error.strerror}; set TMPDIR to a folder with space"
        ) from None
    screen.uploaded(upload)
    return upload


def _make_items(file: Path, options: DemoOptions, show: Callable[[str, float | None], None]) -> None:
    with file.open("wb") as out:
        num_lines = 0
        for chunk in sample_csv(options.num_items, options.seed):
            out.write(chunk)
            num_lines += chunk.count(b"\n")
            show("making items", min(1.0, num_lines / options.num_items))


def _ask_all(
    catalogues: CatalogueClient, model: str, upload: Upload, seed: int, screen: Screen
) -> list[Found]:
    """Scored among the catalogue's own tokens: no item has words that the model would expect in an ad."""
    screen.begin_questions(SHOWN_ITEMS, upload.items)
    found: list[Found] = []
    for number, brief in enumerate(questions(seed), 1):
        screen.question(number, NUM_QUESTIONS, brief)
        body = {
            "model": model,
            "catalogue": upload.name,
            "context": brief,
            "k": SHOWN_ITEMS,
            "beams": 4 * SHOWN_ITEMS,
            "scoring": "catalogue",
        }
        found.append(_found(brief, catalogues.target(body, None)))
        screen.found(found[-1])
    return found


def questions(seed: int) -> list[str]:
    """Different ones, as far as there are."""
    briefs = dict.fromkeys(sample_briefs(10 * NUM_QUESTIONS, seed))
    return list(briefs)[:NUM_QUESTIONS]


def _found(brief: str, answer: dict[str, Any]) -> Found:
    items = tuple(FoundItem(printable(item["text"]), item["logprob"]) for item in answer["items"])
    return Found(
        brief=brief,
        items=items,
        decoding=answer["decoding"],
        steps=answer["steps"],
        rows=answer["rows"],
        ms=answer["timings_ms"]["total"],
    )


def _write_all(
    http: httpx.Client, model: str, found: list[Found], options: DemoOptions, screen: Screen
) -> list[Written]:
    """One after the other, greedily."""
    chat = ChatOptions(
        http_url=options.http_url,
        model=model,
        max_tokens=CREATIVE_TOKENS,
        temperature=0.0,
        seed=options.seed,
        system=_SYSTEM,
        session_id=new_session_id(),
    )
    conversation = Conversation(chat, http)
    products = best_items(found)
    screen.begin_creatives(CREATIVE_TOKENS)
    written: list[Written] = []
    for number, product in enumerate(products, 1):
        conversation.reset()
        screen.creative(number, len(products), product)
        written.append(Written(product, _stream(conversation, _ASK.format(product=product), screen)))
        screen.written(written[-1])
    return written


def best_items(found: list[Found]) -> list[str]:
    """The text of each answer's best item that none before has; none of an answer without such a one."""
    texts: dict[str, None] = {}
    for one in found:
        new = next((item.text for item in one.items if item.text not in texts), None)
        if new is not None:
            texts[new] = None
    return list(texts)


def _stream(conversation: Conversation, message: str, screen: Screen) -> Reply:
    reply: Reply | None = None
    with screen.streaming() as show:
        for part in conversation.send(message):
            if isinstance(part, Delta):
                show(part.text)
            else:
                reply = part
    assert reply is not None, "send ends with a Reply"
    return reply


def _delete(catalogues: CatalogueClient, name: str, screen: Screen, *, must_exist: bool) -> None:
    """An upload that was cut short may have left one all the same."""
    try:
        catalogues.delete(name)
    except CatalogueError as error:
        if must_exist:
            screen.note(f"the catalogue {name} is still there: {error}")
