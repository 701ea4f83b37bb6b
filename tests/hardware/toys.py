"""Toy models on the GPU, beside float64 as `correctness` does it: what compute-sanitizer can follow.

`compute-sanitizer --tool racecheck python3 -m tests.hardware --part toys`.
"""

from benchmarks.gpu_models import GpuModel
from tests.hardware.correctness import check_models
from tests.hardware.part import PartResult, Setting

FORMATS = ("BF16", "Q4_0", "W4G128", "Q8_0")
BUCKETS = (16, 1)


def models(*, is_quick: bool, search_s: float) -> list[GpuModel]:
    formats = FORMATS[:2] if is_quick else FORMATS
    return [
        GpuModel(shape_name="toy", format=format, bucket=bucket, search_s=search_s)
        for bucket in BUCKETS
        for format in formats
    ]


def run(setting: Setting) -> PartResult:
    return check_models(setting, models(is_quick=setting.is_quick, search_s=setting.search_s))
