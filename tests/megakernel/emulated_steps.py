"""Random programs of emulated threads, and by brute force whether any two of their accesses race.

Words and mbarriers are waited for once all arrivals are there, so what happens before what is the same in
any order."""

import random
from enum import IntEnum, auto

import msgspec
import numpy as np

NUM_BLOCKS, WARPS, LANES = 2, 3, 32
MOST_DATA_BYTES = 48
WORDS_AT, NUM_WORDS = 256, 32
MBARRIERS_AT, NUM_MBARRIERS = 512, 12


class Kind(IntEnum):
    """`Kind` of steps.cu."""

    LOAD_SHARED = 0
    STORE_SHARED = auto()
    LOAD_GLOBAL = auto()
    STORE_GLOBAL = auto()
    SYNC_WARP = auto()
    SYNC_THREADS = auto()
    ADD_SHARED = auto()
    WAIT_SHARED = auto()
    ADD_GLOBAL = auto()
    WAIT_GLOBAL = auto()
    ARRIVE = auto()
    WAIT_PHASE = auto()
    COPY = auto()
    ARRIVE_COPIED = auto()
    INIT_MBARRIER = auto()


class Access(msgspec.Struct, frozen=True):
    """Of bytes [begin, end) of a space: a block's shared memory by its number, or global memory, None."""

    space: int | None
    begin: int
    end: int
    is_store: bool
    before: int
    """Bits of the events that happen before it."""
    completion: int
    """The event that happens before whoever may rely on it."""

    def races_with(self, other: "Access") -> bool:
        if self.space != other.space or not (self.is_store or other.is_store):
            return False
        if self.end <= other.begin or other.end <= self.begin:
            return False
        return not (other.before >> self.completion & 1 or self.before >> other.completion & 1)


class Program:
    """Steps by thread, drawn one after the other: that order is one in which they can run."""

    def __init__(self, seed: int, *, num_steps: int, care: float, is_crowded: bool, may_race: bool) -> None:
        """`care`: how likely a warp or block is brought in step, rather than one lane told something.
        `is_crowded`: few lanes of a warp do anything by themselves, to few bytes. `may_race`: one access may,
        with any number of earlier ones."""
        self.random = random.Random(seed)
        self.may_race, self.has_race = may_race, False
        self.busy_lanes, self.data_bytes = (2, 16) if is_crowded else (4, MOST_DATA_BYTES)
        self.steps: dict[tuple[int, int, int], list[tuple[int, int, int, int]]] = {
            (block, warp, lane): []
            for block in range(NUM_BLOCKS)
            for warp in range(WARPS)
            for lane in range(LANES)
        }
        self.known = dict.fromkeys(self.steps, 0)
        self.accesses: list[Access] = []
        self.num_events = 0
        self.words: list[tuple[Kind, int, int, int, int]] = []
        """That may be waited for: how, block, where, for how much, and what that tells."""
        self.used_shared, self.used_mbarriers, self.used_global = [0] * NUM_BLOCKS, [0] * NUM_BLOCKS, 0
        self.arrivals_of: list[list[int]] = []
        """By block and mbarrier."""
        for block in range(NUM_BLOCKS):
            self.set_up(block)
        for _ in range(num_steps):
            self.draw(care)

    def packed(self) -> tuple[np.ndarray, int]:
        """The kernel's input as words, and where its steps begin, in bytes."""
        lists = list(self.steps.values())
        starts = np.cumsum([0, *(len(steps) for steps in lists)])
        header = np.zeros(-(-len(starts) // 4) * 4, dtype=np.uint32)
        header[: len(starts)] = starts
        body = np.array([step for steps in lists for step in steps], dtype=np.uint32).reshape(-1)
        return np.concatenate([header, body]), header.nbytes

    def set_up(self, block: int) -> None:
        first = (block, 0, 0)
        arrivals = [self.random.randint(1, 3) for _ in range(NUM_MBARRIERS)]
        self.arrivals_of.append(arrivals)
        for offset in range(0, MOST_DATA_BYTES, 4):
            self.access(first, Kind.STORE_SHARED, offset, 4)
        for word in range(NUM_WORDS):
            self.add(first, Kind.STORE_SHARED, WORDS_AT + 4 * word, 0, 4)
        for number in range(NUM_MBARRIERS):
            self.add(first, Kind.INIT_MBARRIER, MBARRIERS_AT + 8 * number, arrivals[number])
        self.sync_threads(block, list(range(WARPS)))

    def draw(self, care: float) -> None:
        block, warp = self.random.randrange(NUM_BLOCKS), self.random.randrange(WARPS)
        thread = (block, warp, self.random.randrange(self.busy_lanes))
        if self.random.random() < 0.4:
            self.draw_access(thread)
        elif self.random.random() < care:
            if self.random.random() < 0.5:
                self.sync_warps([(block, warp)])
            else:
                self.sync_threads(block, self.random.sample(range(WARPS), self.random.randint(2, WARPS)))
        elif self.words and self.random.random() < 0.6:
            self.wait(thread)
        else:
            self.draw_word(block)

    def draw_access(self, thread: tuple[int, int, int]) -> None:
        is_store = self.random.random() < 0.4
        if self.random.random() < 0.5:
            num_bytes = self.random.choice((2, 2, 4, 8))
            kind = Kind.STORE_SHARED if is_store else Kind.LOAD_SHARED
        else:
            num_bytes = self.random.choice((1, 2, 4))
            kind = Kind.STORE_GLOBAL if is_store else Kind.LOAD_GLOBAL
        self.access(thread, kind, self.random.randrange(0, self.data_bytes, num_bytes), num_bytes)

    def draw_word(self, block: int) -> None:
        """Arrivals at a word or an mbarrier that is new; waits may follow."""
        shared, mbarriers = self.used_shared, self.used_mbarriers
        choice = self.random.choice(("shared", "global", "mbarrier", "copies"))
        lanes = [(warp, lane) for warp in range(WARPS) for lane in range(self.busy_lanes)]
        if choice == "shared" and shared[block] < NUM_WORDS:
            at = WORDS_AT + 4 * shared[block]
            shared[block] += 1
            threads = [(block, *lane) for lane in self.random.sample(lanes, self.random.randint(1, 3))]
            self.arrive(threads, Kind.ADD_SHARED, Kind.WAIT_SHARED, block, at)
        elif choice == "global":
            at = self.used_global
            self.used_global += 1
            threads = [
                (self.random.randrange(NUM_BLOCKS), *lane)
                for lane in self.random.sample(lanes, self.random.randint(1, 3))
            ]
            self.arrive(threads, Kind.ADD_GLOBAL, Kind.WAIT_GLOBAL, -1, at)
        elif mbarriers[block] < NUM_MBARRIERS:
            at = MBARRIERS_AT + 8 * mbarriers[block]
            arrivals = self.arrivals_of[block][mbarriers[block]]
            mbarriers[block] += 1
            threads = [(block, *lane) for lane in self.random.sample(lanes, arrivals)]
            if choice == "copies":
                self.copy(threads, block, at)
            else:
                self.arrive(threads, Kind.ARRIVE, Kind.WAIT_PHASE, block, at)

    def arrive(
        self, threads: list[tuple[int, int, int]], kind: Kind, wait: Kind, block: int, at: int
    ) -> None:
        told = 0
        for thread in threads:
            self.add(thread, kind, at)
            told |= self.known[thread]
        self.words.append((wait, block, at, len(threads), told))

    def copy(self, threads: list[tuple[int, int, int]], block: int, at: int) -> None:
        told = 0
        for thread in threads:
            for _ in range(self.random.randrange(3)):
                to, start = (self.random.randrange(0, self.data_bytes, 16) for _ in range(2))
                before, completion = self.known[thread], self.num_events
                copied = Access(block, to, to + 16, True, before, completion)
                if self.try_access(copied, Access(None, start, start + 16, False, before, completion)):
                    self.add(thread, Kind.COPY, to, start)
                    told |= 1 << completion
            self.add(thread, Kind.ARRIVE_COPIED, at)
        self.words.append((Kind.WAIT_PHASE, block, at, 0, told))

    def wait(self, thread: tuple[int, int, int]) -> None:
        kind, block, at, target, told = self.random.choice(self.words)
        if block in (-1, thread[0]):
            self.add(thread, kind, at, target)
            self.known[thread] |= told

    def access(self, thread: tuple[int, int, int], kind: Kind, at: int, num_bytes: int) -> None:
        is_store = kind in (Kind.STORE_SHARED, Kind.STORE_GLOBAL)
        space = thread[0] if kind in (Kind.LOAD_SHARED, Kind.STORE_SHARED) else None
        event = self.num_events
        if self.try_access(Access(space, at, at + num_bytes, is_store, self.known[thread], event)):
            self.add(thread, kind, at, event, num_bytes)
            self.known[thread] |= 1 << event

    def try_access(self, *made: Access) -> bool:
        """Whether they are made; together they are one event."""
        is_race = any(one.races_with(other) for one in made for other in self.accesses)
        if is_race and not (self.may_race and not self.has_race):
            return False
        self.has_race |= is_race
        self.accesses.extend(made)
        self.num_events += 1
        return True

    def sync_warps(self, warps: list[tuple[int, int]]) -> None:
        threads = [(*warp, lane) for warp in warps for lane in range(LANES)]
        known = 0
        for thread in threads:
            known |= self.known[thread]
        for thread in threads:
            self.known[thread] = known
            if len(warps) == 1:
                self.add(thread, Kind.SYNC_WARP)

    def sync_threads(self, block: int, warps: list[int]) -> None:
        """Each set of warps has a barrier of its own."""
        number = sum(1 << warp for warp in warps)
        for warp in warps:
            for lane in range(LANES):
                self.add((block, warp, lane), Kind.SYNC_THREADS, number, len(warps) * LANES)
        self.sync_warps([(block, warp) for warp in warps])

    def add(
        self, thread: tuple[int, int, int], kind: Kind, at: int = 0, value: int = 0, num_bytes: int = 0
    ) -> None:
        self.steps[thread].append((kind, at, value, num_bytes))
