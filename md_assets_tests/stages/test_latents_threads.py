"""Which thread runs the models, and what the others may do beside it."""

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch

from md_assets.encoders.vae import VaeEncoder
from md_assets.stages.latents import encode_archives
from md_assets.stages.latents_plan import LatentsPlan


def test_models_run_in_one_thread_and_no_other_has_threads_of_torch_beside_it(
    latents_plan: Callable[..., LatentsPlan], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or libgomp would slow the models down, see `Encoders`."""
    plan = latents_plan({"train/000": 5, "train/001": 0, "train/002": 7}, batch_size=3)
    here = threading.current_thread()
    of_models: list[threading.Thread] = []
    of_others: dict[str, int] = {}

    def noting(run: Callable[..., Any]) -> Callable[..., Any]:
        def noted(*arguments: Any) -> Any:
            of_models.append(threading.current_thread())
            return run(*arguments)

        return noted

    def report(event: dict[str, Any]) -> None:
        if threading.current_thread() is not here:
            of_others[event["event"]] = torch.get_num_threads()

    for method in ("encode", "decode"):
        monkeypatch.setattr(VaeEncoder, method, noting(getattr(VaeEncoder, method)))
    torch.set_num_threads(3)
    encode_archives(plan, report)
    assert torch.get_num_threads() == 3  # those of the models' thread are left alone
    assert len(of_models) == 2 * (2 + 3 + 2)  # at two sizes: batches of 3 of 5 and 7 rows, and a round trip of each
    assert set(of_models) == {here}
    assert of_others == {"published": 1}
