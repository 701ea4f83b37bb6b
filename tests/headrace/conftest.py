"""The router's rig, for commands that talk to one."""

from tests.router.conftest import make_cluster, serve, served, tokenizer  # noqa: F401
