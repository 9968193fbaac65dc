"""What a test module's REPORT, a script that prints a line of JSON a kernel, says of the kernels that it compiles."""

import pytest
from compiling import in_halves


@pytest.fixture(scope="module")
def compiled(request, tmp_path_factory, left_out, full):
    kernels = in_halves(request.module.REPORT, tmp_path_factory.mktemp("triton"), *([] if full else ["few"]))
    if not full:
        left_out[f"kernels of {request.module.REPORT}"] = kernels[0]["left_out"]
    return kernels


@pytest.fixture
def kernels(compiled):
    return [kernel for kernel in compiled if not kernel["debug"]]


@pytest.fixture
def debugged(compiled):
    (kernel,) = (kernel for kernel in compiled if kernel["debug"])
    return kernel
