import pytest

from aeolian.domain.apps import HEARTBEAT_TIMEOUT_S, KEPT_BY_CLIENT, TRANSITIONS, App, AppState, silent_apps
from aeolian.domain.errors import FailedPrecondition


def app(state: AppState, app_id: str = "ap-1") -> App:
    return App(app_id, "local", "en-1", "main", state, created_at=1000.0)


def test_every_state_leads_to_stopped_and_stopped_leads_nowhere():
    assert set(TRANSITIONS) == set(AppState) and not TRANSITIONS[AppState.STOPPED]
    for state in AppState:
        seen, todo = {state}, [state]
        while todo:
            for following in TRANSITIONS[todo.pop()] - seen:
                seen.add(following)
                todo.append(following)
        assert AppState.STOPPED in seen


def test_a_step_that_the_table_lacks_is_refused():
    with pytest.raises(FailedPrecondition, match="ap-1 is stopped"):
        app(AppState.STOPPED).moved_to(AppState.DEPLOYED)


@pytest.mark.parametrize("state", AppState)
def test_silence_ends_only_apps_that_a_client_keeps(state):
    one = app(state)
    assert silent_apps([one], {}, 1000.0 + HEARTBEAT_TIMEOUT_S) == []
    late = 1000.0 + HEARTBEAT_TIMEOUT_S + 1
    assert silent_apps([one], {"ap-1": 1100.0}, late) == []
    assert silent_apps([one], {}, late) == ([one] if state in KEPT_BY_CLIENT else [])
