"""Hand-offs between two real processes: shared memory that is really shared, and senders that really die."""

import asyncio
import os
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from cluster.transfer import HandoffHeader
from tests.cluster.transfer.loopback import ReceiverAtWork, memfds, open_fds, receiver_at_work

ROOT = Path(__file__).parents[3]
COUNT = 64


@asynccontextmanager
async def sender(
    work: ReceiverAtWork, header: HandoffHeader, mode: str
) -> AsyncIterator[asyncio.subprocess.Process]:
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        "-m",
        "tests.cluster.transfer.sender_process",
        work.address,
        header.handoff_id,
        mode,
        str(header.num_tokens),
        cwd=ROOT,
        env={
            **os.environ,
            "PYTHONPATH": os.pathsep.join((str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")]))),
        },
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        yield process
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


async def word_of(process: asyncio.subprocess.Process) -> str:
    assert process.stdout is not None
    return (await asyncio.wait_for(process.stdout.readline(), 30)).decode().strip()


@pytest.mark.parametrize(("mode", "transport"), [("shared", "shared_memory"), ("grpc", "grpc")])
async def test_another_process_hands_off_byte_for_byte(mode: str, transport: str) -> None:
    async with receiver_at_work() as work:
        header, sink = work.expect(0, COUNT)
        async with sender(work, header, mode) as process:
            assert await word_of(process) == transport
        sink.assert_holds(0, COUNT)


@pytest.mark.parametrize("mode", ["shared", "grpc"])
async def test_a_sender_killed_mid_way_frees_the_receiver(mode: str) -> None:
    async with receiver_at_work() as work:
        before = open_fds()
        header, sink = work.expect(0, COUNT)
        async with sender(work, header, f"{mode},hang") as process:
            assert await word_of(process) == "half"
            if mode == "shared":
                assert memfds(), "mapped here while the hand-off runs"
            process.kill()
            await sink.wait_ended()
        assert sink.aborted is not None
        assert sink.aborted.code == "unreachable"
        assert work.receiver.num_live == 0
        assert memfds() == []
        assert open_fds() <= before


async def test_the_receiver_may_forget_a_process_that_hands_off_to_it() -> None:
    """Cancelled here, the sender over there hears why and ends by itself."""
    async with receiver_at_work() as work:
        header, _ = work.expect(0, COUNT)
        async with sender(work, header, "shared,hang") as process:
            assert await word_of(process) == "half"
            work.receiver.cancel(header.handoff_id)
            assert await word_of(process) == "cancelled"
            assert await asyncio.wait_for(process.wait(), 20) == 0
