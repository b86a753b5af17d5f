"""model_list.py: what a key sees of the models. tests/behaviour/test_models.py has the rest."""

import pytest

from policy.model_scheduler import LoadState
from proxy.model_list import shown_state


@pytest.mark.parametrize(
    ("state", "shown"),
    [
        (LoadState.LOADED, "loaded"),
        (LoadState.LOADING, "loading"),
        (LoadState.UNLOADED, "unloaded"),
        (LoadState.UNLOADING, "unloaded"),
    ],
)
def test_a_model_that_is_being_unloaded_is_shown_as_unloaded(state: LoadState, shown: str) -> None:
    assert shown_state(state) == shown
