"""Work in another process: what comes back, and what is left behind when nobody waits any more."""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from edgetrain.errors import BudgetError, ModelError
from edgetrain.planner import Plan
from edgetrain.train.guard import ExhaustedError
from edgetrain.train.helper import Helper, HelperDiedError, NoHelperError

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="the helper is forked")


def double(number: int, _: Helper) -> tuple[int, int, int]:
    return 2 * number, os.getpid(), torch.get_num_threads()


def refuse(_: Helper) -> None:
    raise ModelError(found="one", expected="another", action="change it")


def exhaust(_: Helper) -> None:
    plan = Plan.from_json(PLAN)
    raise ExhaustedError(plan, step=3, reason="no more", tried=2)


def stumble(_: Helper) -> None:
    raise ZeroDivisionError


def die(_: Helper) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def leave(_: Helper) -> None:
    os._exit(1)  # as libgomp does where it cannot start a thread


def ask_once_more(_: Helper) -> tuple[int, int]:
    return os.getpid(), _.ask(functools.partial(double, 1))[1]


def wait(file: str, _: Helper) -> None:
    Path(file).write_text(str(os.getpid()))
    time.sleep(600)


def _plan() -> str:
    from edgetrain.models import create_model
    from edgetrain.planner import uniform_plan

    model = create_model("hybrid18", width=8)
    return uniform_plan(model, "recompute", input_shape=(3, 16, 16), batch_size=2).to_json()


PLAN = _plan()


@pytest.fixture(scope="module")
def helper():
    with Helper() as found:
        yield found


def test_each_work_has_a_process_of_its_own(helper: Helper) -> None:
    (one, first, threads), (other, second, _) = (helper.ask(functools.partial(double, n)) for n in (3, 4))
    assert (one, other, threads) == (6, 8, torch.get_num_threads())
    assert len({os.getpid(), first, second}) == 3


def test_the_work_has_a_helper_of_its_own(helper: Helper) -> None:
    here, there = helper.ask(ask_once_more)
    assert len({os.getpid(), here, there}) == 3


@pytest.mark.parametrize(("work", "kind"), [(refuse, ModelError), (exhaust, BudgetError)])
def test_refusals_come_back_as_they_are(work, kind: type, helper: Helper) -> None:
    with pytest.raises(kind) as raised:
        helper.ask(work)
    with pytest.raises(kind) as here:
        work(helper)
    assert (raised.value.found, raised.value.action) == (here.value.found, here.value.action)
    assert str(raised.value) == str(here.value)
    assert type(raised.value) is type(here.value)


def test_other_errors_are_left_to_this_process(helper: Helper) -> None:
    with pytest.raises(NoHelperError, match="ZeroDivisionError"):
        helper.ask(stumble)
    with pytest.raises(NoHelperError):
        helper.ask(lambda _: 1)  # cannot be pickled


@pytest.mark.parametrize("work", [die, leave])
def test_a_process_that_ends_is_told_apart_and_the_next_one_works(work, helper: Helper) -> None:
    with pytest.raises(HelperDiedError):
        helper.ask(work)
    assert helper.ask(functools.partial(double, 5))[0] == 10


def test_nothing_is_left_when_the_one_who_asked_is_gone(tmp_path: Path) -> None:
    """A process that asks and is killed: the work's process ends too."""
    file = tmp_path / "pid"
    code = "import functools, sys; sys.path.insert(0, sys.argv[1]); from test_helper import Helper, wait; "
    code += "Helper().ask(functools.partial(wait, sys.argv[2]))"
    asking = subprocess.Popen([sys.executable, "-c", code, str(Path(__file__).parent), str(file)])
    deadline = time.monotonic() + 300
    while not (file.exists() and file.read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    working = int(file.read_text())
    asking.kill()
    asking.wait()
    while Path(f"/proc/{working}").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not Path(f"/proc/{working}").exists()
