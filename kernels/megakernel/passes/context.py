"""What passes know beside the module."""

import msgspec

from megakernel.machine import Machine
from megakernel.model.shape import ModelShape
from megakernel.plan import OpPlan, Plan
from megakernel.program import attention_parts


class PlanError(ValueError):
    """A plan that does not go with its graph or machine: names the op, what is wrong, what would do."""


class PassContext(msgspec.Struct, frozen=True, kw_only=True):
    shape: ModelShape
    machine: Machine
    bucket: int
    plan: Plan
    split_tokens: int

    @property
    def num_splits(self) -> int:
        """Of the longest context."""
        return -(-self.shape.max_context_tokens // self.split_tokens)

    @property
    def num_attention_parts(self) -> int:
        return attention_parts(self.machine.num_workers, self.num_splits)

    def op_plan(self, role: str) -> OpPlan:
        if role not in self.plan.ops:
            raise PlanError(f"the plan says nothing of {role}; it has {', '.join(sorted(self.plan.ops))}")
        return self.plan.ops[role]
