import string

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from router.chat_template import ChatMessage, ChatTemplate, ChatTemplateError, UnsupportedTemplateError
from router.errors import RequestError
from router.tokenizer import PromptEncoder
from tests.router.conftest import CHAT_TEMPLATE, SPECIALS

TRIMMING = CHAT_TEMPLATE.replace("message['content']", "message['content'] | trim")


def template(source=CHAT_TEMPLATE):
    return ChatTemplate(source, bos_token="<|endoftext|>", eos_token="<|im_end|>", special_texts=SPECIALS)


def user(content):
    return [ChatMessage(role="user", content=content)]


def encoded(tokenizer, pieces):
    return [token_id for piece in pieces for token_id in tokenizer.encode(piece, allow_special=True)]


def special_sequence(tokenizer, ids):
    return [token_id for token_id in ids if token_id in tokenizer.special_ids]


ordinary = st.text(alphabet=string.ascii_letters + string.digits + " \n\t.,<>|_!é世😀", max_size=60)
hostile_part = st.sampled_from(
    [
        *SPECIALS,
        "<",
        "<|",
        "<|im_",
        "start|>",
        "|>",
        "im_end",
        "<|im_<|im_end|>end|>",
        "assistant\n",
        "x",
        " ",
        ">",
    ]
)
hostile = st.lists(hostile_part, max_size=8).map("".join)


@given(ordinary.filter(lambda text: not any(special in text for special in SPECIALS)))
@settings(max_examples=150, deadline=None)
def test_ordinary_content_has_the_tokens_of_the_whole_rendered_text(tokenizer, content):
    pieces = template().render(user(content))
    assert encoded(tokenizer, pieces) == tokenizer.encode("".join(pieces), allow_special=True)
    assert "".join(pieces) == f"<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("source", [CHAT_TEMPLATE, TRIMMING], ids=["plain", "trimming"])
@given(contents=st.lists(hostile, min_size=1, max_size=4))
@settings(max_examples=150, deadline=None)
def test_no_control_token_ever_comes_from_content(tokenizer, source, contents):
    messages = [ChatMessage(role="user", content=content) for content in contents]
    harmless = [ChatMessage(role="user", content="x") for _ in contents]
    ids = encoded(tokenizer, template(source).render(messages))
    expected = encoded(tokenizer, template(source).render(harmless))
    assert special_sequence(tokenizer, ids) == special_sequence(tokenizer, expected)
    # Nothing is lost or added: the text is what the template makes of it.
    text = b"".join(tokenizer.token_bytes(token_id) for token_id in ids).decode()
    assert text == "".join(template(source).render(messages))
    assert all(content.strip() in text for content in contents)


def test_adjacent_contents_form_no_control_token(tokenizer):
    joined = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
    messages = [*user("<|im_"), *user("end"), *user("|>")]
    assert special_sequence(tokenizer, encoded(tokenizer, template(joined).render(messages))) == []


def test_a_template_sees_the_conversation_and_its_tokens():
    source = (
        "{{ bos_token }}"
        "{% if messages[0]['role'] != 'system' %}{{ raise_exception('system first') }}{% endif %}"
        "{{ messages | tojson }}{{ strftime_now('%Y') | length }}"
    )
    rendered = template(source).render([ChatMessage(role="system", content="a\n<b>&é")])
    assert rendered == ['<|endoftext|>[{"role": "system", "content": "a\\n<b>&é"}]4']
    with pytest.raises(ChatTemplateError, match="system first"):
        template(source).render(user("hello"))


@pytest.mark.parametrize(
    "source",
    [
        "{{ messages[99].content }}",
        "{{ ''.__class__.__mro__ }}",
        "{% for i in range(10**9) %}x{% endfor %}",
        "{{ 1 // (messages | length - 1) }}",
        "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
        "{% for i in range(90000) %}{{ 'x' * 1000 }}{% endfor %}",
        "{{ messages.append(1) }}",
        "{{ (messages[0].content | int).x.y }}",
    ],
)
def test_what_a_template_trips_over_is_the_requests_error(source):
    with pytest.raises(ChatTemplateError):
        template(source).render(user("hello"))


def test_a_template_that_does_not_compile_stops_the_start():
    with pytest.raises(UnsupportedTemplateError, match="does not compile"):
        template("{% if %}")


async def test_encoder_uses_the_cards_template_and_refuses_without_one(served, tokenizer):
    ids = await PromptEncoder(served).chat(user("hello"))
    assert tokenizer.decode(ids) == "user\nhello\nassistant\n"
    bare = msgspec.structs.replace(served, card=msgspec.structs.replace(served.card, chat_template=None))
    with pytest.raises(RequestError) as refused:
        await PromptEncoder(bare).chat(user("hello"))
    assert refused.value.code == "no_chat_template"


async def test_long_text_is_encoded_in_a_thread_and_absurd_text_not_at_all(served, tokenizer):
    encoder = PromptEncoder(served)
    text = "the mill " * 2000
    longest = max(len(tokenizer.token_bytes(i)) for i in range(tokenizer.num_tokens))
    assert await encoder.text("the mill " * 100) == tokenizer.encode("the mill " * 100, allow_special=True)
    with pytest.raises(RequestError) as refused:
        await encoder.text(text * longest)
    assert refused.value.code == "context_length_exceeded"
