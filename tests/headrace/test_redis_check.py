import pytest

from cluster.placement.embedded import EmbeddedRedis
from headrace.redis_check import RedisUnusableError, check_redis, without_password


def test_a_server_tells_its_version(tmp_path):
    with EmbeddedRedis() as server:
        assert check_redis(server.url).count(".") == 2


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("redis://:secret@127.0.0.1:1/0", "leave that out"),
        ("http://:secret@127.0.0.1:1", "no Redis URL"),
        ("unix:///no/such/socket", "/no/such/socket"),
    ],
)
def test_what_cannot_be_used_is_named_without_its_password(url, expected):
    with pytest.raises(RedisUnusableError, match=expected) as error:
        check_redis(url)
    assert "secret" not in str(error.value)


def test_a_wrong_password_is_an_error():
    with EmbeddedRedis() as server:
        scheme, _, rest = server.url.partition("://:")
        wrong = f"{scheme}://:wrong@{rest.partition('@')[2]}"
        with pytest.raises(RedisUnusableError, match="cannot be used"):
            check_redis(wrong)


def test_passwords_are_hidden():
    assert without_password("redis://user:pw@host:1/0") == "redis://***@host:1/0"
    assert without_password("redis://host:1/0") == "redis://host:1/0"
