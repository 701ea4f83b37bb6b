"""Whether the megakernel runs on this machine's GPU, and as what machine it is compiled for it."""

from headrace.execution import Obstacle
from headrace.host import has_nvidia_device
from megakernel.build import BuildError
from megakernel.cuda_build import find_nvcc
from megakernel.cuda_device import CudaError, CudaUnavailableError
from megakernel.cuda_driver import open_driver
from megakernel.gpu_machine import pick_machine
from megakernel.machine import Machine, MachineError


class GpuUnusableError(RuntimeError):
    """The megakernel does not run on a GPU here. The supervisor decides otherwise; a replica ends with it."""

    def __init__(self, obstacle: Obstacle) -> None:
        super().__init__(f"{obstacle.reason}. Fix: {obstacle.fix}")
        self.obstacle = obstacle


def gpu_machine() -> Machine:
    """Of the first device that this process sees. Raises GpuUnusableError."""
    if not has_nvidia_device():
        raise GpuUnusableError(Obstacle("there is no NVIDIA GPU", "none on this machine"))
    try:
        find_nvcc()
        driver = open_driver()
    except (BuildError, CudaUnavailableError, CudaError) as error:
        fix = "install what is missing: `pip install 'headrace[cuda,cuda-tools]'`"
        raise GpuUnusableError(Obstacle(str(error), fix)) from error
    try:
        return pick_machine(driver.facts)
    except MachineError as error:
        reason = str(error).partition(". ")[0]
        raise GpuUnusableError(Obstacle(reason, "none for this GPU; PyTorch runs on it")) from error
    finally:
        driver.close()


def gpu_obstacle() -> Obstacle | None:
    """None as far as is known: compiling the model may show one."""
    try:
        gpu_machine()
    except GpuUnusableError as error:
        return error.obstacle
    return None
