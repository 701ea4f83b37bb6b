"""Renders a model's own chat template, with control tokens that only the template can write.

A message may contain the text of a control token (`<|im_end|>`). Parsed as one, it would end the
user's turn and begin another's. So `ContentMarker` cuts such text with a marker nobody can guess;
`ChatTemplate.render` cuts the rendered text at the markers, and the pieces are tokenized one by one:
no piece holds a control token that came from a message. Without such text there are no markers, and
the tokens are those of the whole rendered text.
"""

import datetime
import json
import re
import secrets
from collections.abc import Iterable, Sequence
from typing import Any, NoReturn

import jinja2
import jinja2.ext
import jinja2.sandbox
import msgspec

MAX_RENDERED_CHARS = 16 * 1024 * 1024


class ChatTemplateError(ValueError):
    """These messages do not render. Handled as a bad request by the endpoints."""


class UnsupportedTemplateError(ValueError):
    """A model's template that does not compile. Raised when the router starts."""


class ChatMessage(msgspec.Struct, frozen=True, kw_only=True):
    """A message as templates see it."""

    role: str
    content: str


class ContentMarker:
    """Puts the marker wherever a message's text could become, or help to form, a control token.

    Inside each control token's text; behind a beginning of one at the content's end (the template, or
    the next message, might go on with the rest); before a rest of one at its start; around a content
    that lies wholly inside one. A rest of one character is let through: nothing but a template
    that writes all of a control token but its last character could be completed by it.
    """

    def __init__(self, special_texts: Iterable[str]) -> None:
        self.marker = f"\ue000{secrets.token_hex(12)}\ue001"
        """Private-use characters around 96 random bits, fresh for each process, never sent anywhere."""
        texts = sorted({text for text in special_texts if text}, key=len, reverse=True)
        self._texts = texts
        # Lookahead, so that overlapping occurrences are all found.
        self._inside = re.compile(f"(?=(?:{'|'.join(map(re.escape, texts))}))") if texts else None
        self._first_chars = "".join(sorted({text[0] for text in texts}))
        self._beginnings = tuple({text[:size] for text in texts for size in range(1, len(text))})
        self._rests = tuple({text[start:] for text in texts for start in range(1, len(text) - 1)})

    def mark(self, content: str) -> str:
        """`content` itself, unless it holds something suspicious."""
        marked = self._mark_inside(content)
        is_fragment = len(content) > 1 and any(content in text for text in self._texts)
        if is_fragment or content.startswith(self._rests):
            marked = self.marker + marked
        if is_fragment or content.endswith(self._beginnings):
            marked = marked + self.marker
        return marked

    def _mark_inside(self, content: str) -> str:
        if self._inside is None or not any(text in content for text in self._texts):
            return content
        pieces, end = [], 0
        for match in self._inside.finditer(content):
            cut = match.start() + 1
            pieces += [content[end:cut], self.marker]
            end = cut
        return "".join(pieces) + content[end:]


class ChatTemplate:
    """One model's compiled template. Safe to share between threads."""

    def __init__(self, source: str, *, bos_token: str, eos_token: str, special_texts: Iterable[str]) -> None:
        """Raises UnsupportedTemplateError."""
        environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols], autoescape=False
        )
        environment.filters["tojson"] = _to_json
        environment.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
        try:
            self._template = environment.from_string(source)
        except (jinja2.TemplateError, RecursionError) as error:
            raise UnsupportedTemplateError(f"the model's chat template does not compile: {error}") from None
        self._globals = {"bos_token": bos_token, "eos_token": eos_token}
        self._marker = ContentMarker(special_texts)

    def render(self, messages: Sequence[ChatMessage]) -> list[str]:
        """The prompt as pieces to be tokenized apart, with special tokens allowed in each; most often one.

        Raises ChatTemplateError: what the template itself says against the messages, or too much output.
        """
        marked = [{"role": m.role, "content": self._marker.mark(m.content)} for m in messages]
        try:
            text = self._bounded(marked)
        except ChatTemplateError:
            raise
        # A template is a program over user data: whatever it trips over is the messages' fault here.
        except (jinja2.TemplateError, ArithmeticError, LookupError, TypeError, ValueError) as error:
            raise ChatTemplateError(f"the chat template refuses the messages: {error}") from None
        except (RecursionError, AttributeError, MemoryError) as error:
            raise ChatTemplateError(
                f"the chat template fails on the messages: {type(error).__name__}"
            ) from None
        return [piece for piece in text.split(self._marker.marker) if piece]

    def _bounded(self, messages: list[dict[str, str]]) -> str:
        pieces: list[str] = []
        num_chars = 0
        for piece in self._template.generate(
            messages=messages, add_generation_prompt=True, tools=None, documents=None, **self._globals
        ):
            num_chars += len(piece)
            if num_chars > MAX_RENDERED_CHARS:
                raise ChatTemplateError(f"the rendered messages exceed {MAX_RENDERED_CHARS} characters")
            pieces.append(piece)
        return "".join(pieces)


def _raise_exception(message: str) -> NoReturn:
    raise ChatTemplateError(f"the chat template refuses the messages: {message}")


def _strftime_now(format: str) -> str:
    return datetime.datetime.now(datetime.UTC).strftime(format)


def _to_json(value: Any, indent: int | None = None) -> str:
    """Plain JSON: Jinja's own filter escapes HTML, which prompts are not."""
    return json.dumps(value, ensure_ascii=False, indent=indent)
