"""The decode engine: continuous batching over one executor, driven by one thread.

What other threads want goes to the roster through an `Inbox`; what happens to a request comes out of
`step` as events, in order.

Where nobody waits, several steps may run without the host (`plan_run`): `step` then takes them one by one,
and does all that it does otherwise but for admission, which the run's end must come before.
"""

import logging
import time
from collections.abc import Callable
from collections.abc import Sequence as SequenceOf
from typing import Protocol

from cluster.config import DecodeConfig
from cluster.messages import (
    DecodeEvent,
    FailureCode,
    FinishReason,
    GenerateRequest,
    StepCost,
    TokensEmitted,
)
from cluster.metrics import DecodeMetrics
from cluster.model_card import ModelCard
from cluster.placement.predict import StepTable, step_ms, step_table
from cluster.text import Tokenizer
from cluster.timeline import Stage
from decode_workers.draft_tree import NO_DRAFT, DraftTree, check_tree, node_depths
from decode_workers.executor import MultiStepExecutor, StepExecutor
from decode_workers.handoffs import HandoffPort, Handoffs
from decode_workers.inbox import Inbox
from decode_workers.intake import Intake
from decode_workers.kv_pool import KvPool
from decode_workers.multi_step_run import MultiStepRun, ask_for
from decode_workers.request_check import RequestLimits
from decode_workers.roster import Roster
from decode_workers.rows import StepRows, assemble
from decode_workers.scheduler import RowGrant, Waiting, plan_run, plan_step
from decode_workers.search_batch import give_answers, take_search_rows
from decode_workers.sequence import Sequence, SequenceState
from decode_workers.step_batch import StepResult
from decode_workers.targeting.search import TargetingSearch
from decode_workers.verdicts import Verdict, judge_step

logger = logging.getLogger(__name__)


class Drafter(Protocol):
    """Proposes trees below sequences' last tokens. It changes how fast tokens come, never which."""

    def expect(self, request: GenerateRequest) -> None:
        """It has arrived, and may be drafted for. From any thread; never blocks."""
        ...

    def draft(
        self, grants: SequenceOf[RowGrant], spare_rows: int, table: StepTable | None
    ) -> SequenceOf[DraftTree]:
        """One tree a grant, within its `max_draft_nodes`, all within `spare_rows`; `table`: steps' costs."""
        ...

    def learn(self, sequence: Sequence) -> None:
        """Its tokens have grown."""
        ...


class DecodeEngine:
    def __init__(
        self,
        executor: StepExecutor,
        tokenizer: Tokenizer,
        card: ModelCard,
        config: DecodeConfig,
        *,
        handoffs: HandoffPort,
        inbox: Inbox,
        metrics: DecodeMetrics | None = None,
        drafter: Drafter | None = None,
        clock_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        """`inbox` has what other threads call here; it is drained between two calls of `step`."""
        self.metrics = metrics or DecodeMetrics()
        self.kv = KvPool(
            executor,
            max_sequences=config.max_running_sequences,
            max_context_tokens=card.max_context_tokens,
            used_tokens=self.metrics.kv_used_tokens,
        )
        self.metrics.kv_total_tokens.set(self.kv.total_tokens)
        limits = RequestLimits(
            vocab_size=executor.vocab_size,
            max_context_tokens=card.max_context_tokens,
            kv_pool_tokens=self.kv.total_tokens,
        )
        self.roster = Roster(
            self.kv,
            Handoffs(handoffs, executor, inbox.post, self.metrics),
            Intake(tokenizer, card.eos_token_ids, limits, executor.layout.fingerprint),
            config,
            self.metrics,
            clock_ns,
        )
        self._executor = executor
        self._drafter = drafter
        self._inbox = inbox
        self._clock_ns = clock_ns
        self._max_rows = min(config.max_rows_per_step, executor.buckets[-1])
        self._multi_stepper: MultiStepExecutor | None = None
        self._most_steps = 1
        if isinstance(executor, MultiStepExecutor) and drafter is None:
            self._multi_stepper = executor
            self._most_steps = min(config.max_steps_per_launch, executor.max_steps_per_launch)
        self._step_table: StepTable | None = None
        self._run_under_way: MultiStepRun | None = None
        self._num_grants = 0
        self.num_failed_steps = 0
        """Steps and runs in a row, up to the last, that the executor raised in."""

    @property
    def has_work(self) -> bool:
        """Whether a step now would do something."""
        return self._run_under_way is not None or self.roster.has_work

    def measure(self) -> tuple[StepCost, ...]:
        """The executor's step table, by which runs end before deadlines from then on."""
        assert self._run_under_way is None, "measured beside a run"
        costs = self._executor.measure()
        self._step_table = step_table(costs)
        self.roster.predict_by(self._step_table)
        return costs

    def step(self) -> list[DecodeEvent]:
        """Admit what fits, run one step over what is running, and say what happened since the last call."""
        self.roster.expire()
        if not self._go_on():
            grants = self._schedule()
            num_steps = self._plan_run(grants)
            if num_steps > 1:
                self._start_run(grants, num_steps)
                self._go_on()
            elif grants:
                started_s = time.perf_counter()
                trees, searches = self._draft(grants), take_search_rows(grants)
                rows = assemble(grants, trees, self.kv.block_tables, self.kv.block_size_tokens, searches)
                result = self._run(grants, rows)
                if result is not None:
                    verdicts = self._verify(grants, trees, rows, result)
                    self._commit(grants, trees, verdicts)
                self.metrics.step_seconds.observe(time.perf_counter() - started_s)
        self.roster.count()
        return self.roster.take_events()

    def end_run(self) -> None:
        """Wait for the steps under way, and drop what they give: nothing of the executor's runs after it."""
        run = self._run_under_way
        if run is None:
            return
        run.stop()
        try:
            while run.next() is not None:
                pass
        except Exception:
            logger.exception("a run of several steps failed as it was ended")
        self._forget_run()

    def _schedule(self) -> list[RowGrant]:
        self.roster.admit()
        if not self.roster.running:
            return []
        running = list(self.roster.running.values())
        grants = plan_step(running, self._max_rows, can_draft=self._drafter is not None)
        for grant in grants:
            if grant.sequence.last_grant == 0:
                grant.sequence.timeline.stamp(Stage.FIRST_STEP_STARTED)
            self._num_grants += 1
            grant.sequence.last_grant = self._num_grants
        return grants

    def _plan_run(self, grants: list[RowGrant]) -> int:
        if self._most_steps == 1 or not grants:
            return 1
        roster, table = self.roster, self._step_table
        return plan_run(
            list(roster.running.values()),
            Waiting(
                num_calls=len(self._inbox), num_queued=roster.num_queued, num_awaiting=roster.num_awaiting
            ),
            most_steps=self._most_steps,
            max_rows=self._max_rows,
            step_ms=0.0 if table is None else step_ms(table, len(grants)),
            now_ns=self._clock_ns(),
        )

    def _start_run(self, grants: list[RowGrant], num_steps: int) -> None:
        assert self._multi_stepper is not None, "a plan for an executor that runs single steps"
        asked = ask_for([grant.sequence for grant in grants], num_steps, self.kv)
        try:
            run = self._multi_stepper.start(asked)
        except Exception as error:
            logger.exception("a run of %d sequences did not start", len(grants))
            self._fail_step(grants, error)
            return
        self.kv.begin_run()
        self._run_under_way = MultiStepRun(run, asked, grants)

    def _go_on(self) -> bool:
        """Take the next step of the run under way; false where there is none, or it has ended."""
        run = self._run_under_way
        if run is None:
            return False
        if self._is_waited_for(run):
            run.stop()
        started_s = time.perf_counter()
        try:
            told = run.next()
        except Exception as error:
            logger.exception("a run of %d sequences failed", len(run.grants))
            self._fail_step(run.grants, error)
            self._forget_run()
            return True
        if told is None:
            self._forget_run()
            return False
        self._count_step(told.num_rows)
        self._commit(told.grants, [NO_DRAFT] * len(told.grants), told.verdicts)
        self.metrics.step_seconds.observe(time.perf_counter() - started_s)
        return True

    def _is_waited_for(self, run: MultiStepRun) -> bool:
        """Whether somebody wants to join or to ask, or the steps go on for a sequence that ended here."""
        if len(self._inbox) or self.roster.can_admit:
            return True
        has_joined = len(self.roster.running) > len(run.grants)
        return has_joined or any(one.state is not SequenceState.RUNNING for one in run.live)

    def _forget_run(self) -> None:
        self._run_under_way = None
        self.kv.end_run()

    def _draft(self, grants: list[RowGrant]) -> list[DraftTree]:
        spare_rows = self._max_rows - sum(grant.num_rows for grant in grants)
        if self._drafter is None or spare_rows == 0:
            return [NO_DRAFT] * len(grants)
        trees = list(self._drafter.draft(grants, spare_rows, self._step_table))
        for grant, tree in zip(grants, trees, strict=True):
            check_tree(tree, grant.max_draft_nodes)
        num_nodes = sum(tree.num_nodes for tree in trees)
        assert num_nodes <= spare_rows, f"{num_nodes} nodes drafted, {spare_rows} rows left"
        return trees

    def _run(self, grants: list[RowGrant], rows: StepRows) -> StepResult | None:
        """None where the executor raised: the step's sequences have failed then."""
        try:
            result = self._executor.run(rows.batch)
        except Exception as error:
            logger.exception("a step of %d rows failed", rows.batch.num_rows)
            self._fail_step(grants, error)
            return None
        self._count_step(rows.batch.num_rows)
        return result

    def _fail_step(self, grants: list[RowGrant], error: Exception) -> None:
        """For a retry elsewhere."""
        self.num_failed_steps += 1
        message = f"the executor failed: {type(error).__name__}: {error}"
        for grant in grants:
            self.roster.fail(grant.sequence, FailureCode.INTERNAL, message, is_retryable=True)

    def _count_step(self, num_rows: int) -> None:
        self.num_failed_steps = 0
        self.metrics.steps.inc()
        self.metrics.rows.inc(num_rows)

    def _verify(
        self, grants: list[RowGrant], trees: list[DraftTree], rows: StepRows, result: StepResult
    ) -> list[Verdict]:
        verdicts = judge_step(grants, trees, rows.answer_starts, result)
        if rows.search_answers:
            faults = give_answers(rows.search_answers, result)
            verdicts = [
                faults.get(grant.sequence.request.request_id, verdict)
                for grant, verdict in zip(grants, verdicts, strict=True)
            ]
        return verdicts

    def _commit(self, grants: list[RowGrant], trees: list[DraftTree], verdicts: list[Verdict]) -> None:
        num_emitted = num_prefilled = 0
        for grant, tree, verdict in zip(grants, trees, verdicts, strict=True):
            sequence = grant.sequence
            if verdict.fault is not None:
                self.roster.fail(sequence, FailureCode.INTERNAL, verdict.fault, is_retryable=False)
                continue
            if verdict.path:
                self._keep_path(sequence, grant.num_forced, tree, verdict.path)
            sequence.committed += grant.num_forced
            if sequence.search is not None:
                num_prefilled += grant.num_forced
                self._commit_search(sequence, sequence.search)
            elif verdict.tokens:
                num_of_own = self._emit(sequence, verdict)
                num_emitted += num_of_own
                if tree.token_ids:
                    self.metrics.count_draft(tree.num_nodes, min(num_of_own, len(verdict.path)), num_of_own)
                if self._drafter is not None:
                    self._drafter.learn(sequence)
                num_prefilled += grant.num_forced - 1
            else:
                num_prefilled += grant.num_forced
        self.metrics.generation_tokens.inc(num_emitted)
        self.metrics.local_prefill_tokens.inc(num_prefilled)

    def _commit_search(self, sequence: Sequence, search: TargetingSearch) -> None:
        if sequence.is_searching and not sequence.is_prompt_published:
            sequence.timeline.stamp(Stage.FIRST_TOKEN)
            self.roster.publish_prompt(sequence)
        if search.is_done:
            self.roster.finish(sequence, FinishReason.STOP)

    def _keep_path(self, sequence: Sequence, num_forced: int, tree: DraftTree, path: tuple[int, ...]) -> None:
        """Move the accepted nodes' KV from the slots of their rows to those of their positions."""
        assert sequence.reservation is not None, "a running sequence without blocks"
        depths = node_depths(tree)
        first = sequence.committed + num_forced
        moves = [(first + node, first + depths[node] - 1) for node in path if node != depths[node] - 1]
        if moves:
            source, destination = zip(*moves, strict=True)
            self.kv.move(sequence.reservation, source, destination)

    def _emit(self, sequence: Sequence, verdict: Verdict) -> int:
        """Append the verdict's tokens up to the one that ends the completion; how many those are."""
        completion, first_index = sequence.completion, sequence.next_index
        texts: list[str] = []
        for token in verdict.tokens:
            sequence.tokens.append(token.token_id)
            texts.append(completion.push(token.token_id))
            if completion.finish_reason is not None:
                break
        # The last one is pending: it has no KV yet, whether it was drafted or not.
        sequence.committed = len(sequence.tokens) - 1
        if not sequence.is_prompt_published:
            sequence.timeline.stamp(Stage.FIRST_TOKEN)
            self.roster.publish_prompt(sequence)
        self.roster.emit(
            TokensEmitted(
                request_id=sequence.request.request_id,
                first_index=first_index,
                tokens=verdict.tokens[: len(texts)],
                text="".join(texts),
            )
        )
        if completion.finish_reason is not None:
            self.roster.finish(sequence, completion.finish_reason)
        return len(texts)
