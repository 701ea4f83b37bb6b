import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.metrics import RouterMetrics
from router import admission
from router.admission import InflightLimit, Limits
from router.errors import RequestError

LIMITS = Limits(
    model="m",
    vocab_size=100,
    max_context_tokens=64,
    default_max_tokens=16,
    max_inflight=8,
    request_timeout_s=10.0,
)


def refused(call, *args):
    with pytest.raises(RequestError) as error:
        call(*args)
    return error.value


def test_max_tokens_default_to_what_fits():
    assert admission.max_tokens_for(10, None, LIMITS, "prompt") == 16
    assert admission.max_tokens_for(60, None, LIMITS, "prompt") == 4
    assert admission.max_tokens_for(60, 4, LIMITS, "prompt") == 4


@pytest.mark.parametrize(
    ("num_prompt", "asked", "param"), [(60, 5, "max_tokens"), (64, None, "prompt"), (90, 1, "prompt")]
)
def test_a_context_too_long_names_prompt_max_tokens_and_limit(num_prompt, asked, param):
    error = refused(admission.max_tokens_for, num_prompt, asked, LIMITS, "prompt")
    assert (error.status, error.code, error.param) == (400, "context_length_exceeded", param)
    assert str(num_prompt) in error.message
    assert "64" in error.message
    assert "max_tokens 5" in error.message or asked != 5


@given(st.integers(1, 63), st.none() | st.integers(1, 2**31))
def test_admitted_requests_fit_the_context(num_prompt, asked):
    try:
        max_tokens = admission.max_tokens_for(num_prompt, asked, LIMITS, "prompt")
    except RequestError:
        assert asked is not None
        assert num_prompt + asked > 64
    else:
        assert max_tokens >= 1
        assert num_prompt + max_tokens <= 64


def test_prompts_take_openais_four_shapes():
    assert admission.prompts_of("x") == ["x"]
    assert admission.prompts_of(["x", "y"]) == ["x", "y"]
    assert admission.prompts_of([1, 2]) == [[1, 2]]
    assert admission.prompts_of([[1], [2]]) == [[1], [2]]


@pytest.mark.parametrize(
    "prompt", ["", [], [""], [[]], [1, "x"], [[1], "x"], [[1], 2], ["x"] * 17, [[1]] * 17]
)
def test_other_prompts_are_refused(prompt):
    assert refused(admission.prompts_of, prompt).param == "prompt"


@pytest.mark.parametrize("token_ids", [[-1], [100], [0, 5, 10**30]])
def test_token_ids_outside_the_vocabulary_are_refused(token_ids):
    assert "0 to 99" in refused(admission.check_token_ids, token_ids, LIMITS, "prompt").message


@given(st.integers(-(2**63), 2**63 - 1))
def test_any_int64_seed_is_a_uint64(seed):
    assert 0 <= admission.concrete_seed(seed) < 2**64
    assert admission.concrete_seed(seed) % 2**64 == seed % 2**64


@given(st.integers(0, 2**64 - 1))
def test_choices_have_seeds_of_their_own_that_depend_on_the_requests(seed):
    seeds = [admission.choice_seed(seed, choice) for choice in range(16)]
    assert seeds[0] == seed
    assert len(set(seeds)) == 16
    assert seeds == [admission.choice_seed(seed, choice) for choice in range(16)]
    assert all(0 <= one < 2**64 for one in seeds)


def test_drawn_seeds_differ():
    assert admission.concrete_seed(None) != admission.concrete_seed(None)


def test_deadlines_end_no_later_than_the_request_timeout():
    assert admission.deadline_unix_ns(50, 1_000, LIMITS) == 1_000 + 50_000_000
    assert admission.deadline_unix_ns(None, 0, LIMITS) == 10_000_000_000
    assert admission.deadline_unix_ns(3_600_000, 0, LIMITS) == 10_000_000_000


def test_headers():
    assert admission.deadline_header("250", "h") == 250
    for wrong in ("0", "-1", "x", "1.5", "", "99999999999", "²"):
        assert refused(admission.deadline_header, wrong, "h").param == "h"
    assert admission.session_of("s-1", "h") == "s-1"
    for wrong in ("", "a b", "x" * 129, "é", "a\n"):
        assert refused(admission.session_of, wrong, "h").param == "h"
    assert admission.prefill_hop_of(None, "h") is None
    assert admission.prefill_hop_of("always", "h") == "always"
    assert refused(admission.prefill_hop_of, "maybe", "h").param == "h"


def test_tenants_are_hashes_of_keys():
    first, second = admission.tenant_of("Bearer key-1"), admission.tenant_of("bearer key-2")
    assert first != second
    assert "key" not in first
    assert (
        admission.tenant_of(None) == admission.tenant_of("Basic abc") == admission.tenant_of("Bearer ") == ""
    )
    assert admission.tenant_session(first, "s") != admission.tenant_session(second, "s")


def test_same_value_twice_is_no_conflict():
    assert admission.same_or_only("a", 1, "b", 1) == 1
    assert admission.same_or_only("a", None, "b", 2) == 2
    assert refused(admission.same_or_only, "a", 1, "b", 2).param == "a"


def test_inflight_bound_is_exact_and_given_back():
    limit = InflightLimit(3, RouterMetrics())
    with limit.admit(2):
        with pytest.raises(RequestError) as error, limit.admit(2):
            pass
        assert (error.value.status, error.value.retry_after_s) == (429, 1.0)
        with limit.admit(1):
            assert limit.num_inflight == 3
    assert limit.num_inflight == 0
