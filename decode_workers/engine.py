"""The decode engine: continuous batching over one executor, driven by one thread.

What other threads want goes to the roster through an `Inbox`; what happens to a request comes out of
`step` as events, in order.
"""

import logging
import time
from collections.abc import Callable

from cluster.config import DecodeConfig
from cluster.messages import DecodeEvent, FailureCode, TokensEmitted
from cluster.metrics import DecodeMetrics
from cluster.model_card import ModelCard
from cluster.text import Tokenizer
from cluster.timeline import Stage
from decode_workers.draft_tree import NO_DRAFT, DraftTree, check_tree, node_depths
from decode_workers.executor import StepExecutor
from decode_workers.handoffs import HandoffPort, Handoffs
from decode_workers.inbox import Call
from decode_workers.intake import Intake
from decode_workers.kv_pool import KvPool
from decode_workers.request_check import RequestLimits
from decode_workers.roster import Roster
from decode_workers.rows import StepRows, assemble
from decode_workers.scheduler import RowGrant, plan_step
from decode_workers.sequence import Sequence
from decode_workers.step_batch import StepResult
from decode_workers.verdicts import Verdict, judge_step

Drafter = Callable[[Sequence, int], DraftTree]
"""(sequence, most nodes) -> a tree below its last token. It changes how fast tokens come, never which."""

logger = logging.getLogger(__name__)


class DecodeEngine:
    def __init__(
        self,
        executor: StepExecutor,
        tokenizer: Tokenizer,
        card: ModelCard,
        config: DecodeConfig,
        *,
        handoffs: HandoffPort,
        post: Callable[[Call], None],
        metrics: DecodeMetrics | None = None,
        drafter: Drafter | None = None,
        clock_ns: Callable[[], int] = time.time_ns,
    ) -> None:
        """`post` brings a call from the hand-off's thread to the engine's; it runs before the next step."""
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
            Handoffs(handoffs, executor, post, self.metrics.handoffs, self.metrics.handoff_bytes),
            Intake(tokenizer, card.eos_token_ids, limits, executor.layout.fingerprint),
            config,
            self.metrics,
            clock_ns,
        )
        self._executor = executor
        self._drafter = drafter
        self._max_rows = min(config.max_rows_per_step, executor.buckets[-1])
        self._num_grants = 0
        self.num_failed_steps = 0
        """Steps in a row, up to the last, that the executor raised in."""

    def step(self) -> list[DecodeEvent]:
        """Admit what fits, run one step over what is running, and say what happened since the last call."""
        grants = self._schedule()
        if grants:
            started_s = time.perf_counter()
            trees = self._draft(grants)
            rows = assemble(grants, trees, self.kv.block_tables, self.kv.block_size_tokens)
            result = self._run(grants, rows)
            if result is not None:
                verdicts = self._verify(grants, trees, rows, result)
                self._commit(grants, trees, verdicts)
            self.metrics.step_seconds.observe(time.perf_counter() - started_s)
        self.roster.count()
        return self.roster.take_events()

    def _schedule(self) -> list[RowGrant]:
        self.roster.expire()
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

    def _draft(self, grants: list[RowGrant]) -> list[DraftTree]:
        if self._drafter is None:
            return [NO_DRAFT] * len(grants)
        trees: list[DraftTree] = []
        for grant in grants:
            max_nodes = grant.max_draft_nodes
            tree = self._drafter(grant.sequence, max_nodes) if max_nodes else NO_DRAFT
            check_tree(tree, max_nodes)
            trees.append(tree)
        return trees

    def _run(self, grants: list[RowGrant], rows: StepRows) -> StepResult | None:
        """None where the executor raised: the step's sequences have failed then, for a retry elsewhere."""
        try:
            result = self._executor.run(rows.batch)
        except Exception as error:
            logger.exception("a step of %d rows failed", rows.batch.num_rows)
            self.num_failed_steps += 1
            message = f"the executor failed: {type(error).__name__}: {error}"
            for grant in grants:
                self.roster.fail(grant.sequence, FailureCode.INTERNAL, message, is_retryable=True)
            return None
        self.num_failed_steps = 0
        self.metrics.steps.inc()
        self.metrics.rows.inc(rows.batch.num_rows)
        return result

    def _verify(
        self, grants: list[RowGrant], trees: list[DraftTree], rows: StepRows, result: StepResult
    ) -> list[Verdict]:
        return judge_step(grants, trees, rows.answer_starts, result)

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
            if verdict.tokens:
                num_emitted += self._emit(sequence, verdict)
                num_prefilled += grant.num_forced - 1
            else:
                num_prefilled += grant.num_forced
        self.metrics.generation_tokens.inc(num_emitted)
        self.metrics.local_prefill_tokens.inc(num_prefilled)

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
