"""The terminal's side of a conversation."""

import sys

from rich.markup import escape

from headrace.chat import ChatError, ChatOptions, Conversation, Delta, Reply
from headrace.terminal import err, out

_HELP = "/reset forgets the conversation, /exit or Ctrl-D leaves, Ctrl-C stops an answer"


def ask(conversation: Conversation, message: str) -> Reply:
    """Prints the answer as it comes, and its figures on standard error. Raises ChatError."""
    reply: Reply | None = None
    with err.status("thinking") as spinner:
        for item in conversation.send(message):
            spinner.stop()
            if isinstance(item, Delta):
                sys.stdout.write(item.text)
                sys.stdout.flush()
            else:
                reply = item
    sys.stdout.write("\n")
    sys.stdout.flush()
    assert reply is not None, "send ends with a Reply"
    err.print(f"[dim]{escape(reply.summary())}[/]")
    return reply


def converse(conversation: Conversation, options: ChatOptions) -> None:
    """Until the user leaves; an error or Ctrl-C ends one answer only."""
    import readline  # noqa: F401 - gives `input` its history and editing

    err.print(f"[bold]{escape(options.model)}[/] at {options.http_url}, session {options.session_id}")
    err.print(f"[dim]{_HELP}[/]")
    while True:
        try:
            text = input("> ").strip()
        except (EOFError, KeyboardInterrupt):
            out.print()
            return
        if text in ("/exit", "/quit"):
            return
        if text == "/reset":
            conversation.reset()
        elif text.startswith("/"):
            err.print(_HELP)
        elif text:
            try:
                ask(conversation, text)
            except ChatError as error:
                err.print(f"[bold red]error:[/] {escape(str(error))}")
            except KeyboardInterrupt:
                err.print("\n[dim]stopped[/]")
