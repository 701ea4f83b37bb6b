"""Whether a Redis that the user named can be used, before anything is started on it."""

import re

import redis
from redis.backoff import NoBackoff
from redis.retry import Retry

_TIMEOUT_S = 3.0
_CREDENTIALS = re.compile(r"//[^/@]*@")


class RedisUnusableError(Exception):
    """The message names the server, without its password, and what to change."""


def without_password(url: str) -> str:
    return _CREDENTIALS.sub("//***@", url)


def check_redis(url: str) -> str:
    """Its version. Raises RedisUnusableError."""
    shown = without_password(url)
    try:
        client = redis.Redis.from_url(
            url, socket_timeout=_TIMEOUT_S, socket_connect_timeout=_TIMEOUT_S, retry=Retry(NoBackoff(), 0)
        )
    except ValueError as error:
        raise RedisUnusableError(f"`placement.redis_url` {shown} is no Redis URL: {error}") from None
    try:
        with client:
            info = client.info("server")
    except (redis.RedisError, OSError) as error:
        raise RedisUnusableError(
            f"Redis at {shown} cannot be used ({error}): start it, or correct --redis-url, or leave that out "
            "to have one of the cluster's own"
        ) from None
    assert isinstance(info, dict)
    return str(info.get("redis_version", "of an unknown version"))
