from aeolian.control.audit import CLEAN_S, KEPT_S, MAX_REFUSALS, REFUSALS_S, AuditTrail
from aeolian.domain.caller import Caller
from aeolian.domain.clock import ManualClock

ANN = Caller(workspace="local", token_id="ak-1", name="ann")
TASK = Caller(workspace="local", task_id="ta-1")


async def test_entries_tell_who_did_what_where_and_to_what(database):
    trail = AuditTrail(database, ManualClock())
    await trail.record(ANN, "SecretDelete", "main", ["keys", "st-1"])
    await trail.record(TASK, "DictDelete", "dev", ["di-1"], "refused")
    await trail.record_local("quota set", "dev", ["max_containers=2"])
    told = [
        (one.who, one.caller_id, one.action, one.environment, one.target, one.result) for one in await trail.entries()
    ]
    assert told == [
        ("ann", "ak-1", "SecretDelete", "main", "keys st-1", "done"),
        ("ta-1", "ta-1", "DictDelete", "dev", "di-1", "refused"),
        ("local", "local", "quota set", "dev", "max_containers=2", "done"),
    ]
    assert [one.action for one in await trail.entries(of="ann")] == ["SecretDelete"]
    assert [one.action for one in await trail.entries(of="ak-1")] == ["SecretDelete"]
    assert [one.action for one in await trail.entries(limit=1)] == ["quota set"]


async def test_whoever_is_refused_all_the_time_does_not_fill_the_disk(database):
    clock = ManualClock()
    trail = AuditTrail(database, clock)
    for _ in range(MAX_REFUSALS + 5):
        await trail.record(TASK, "SecretList", "main", [], "refused")
    await trail.record(ANN, "SecretList", "main", [], "refused")
    assert len(await trail.entries()) == MAX_REFUSALS + 1
    clock.advance(REFUSALS_S + 1)
    await trail.record(TASK, "SecretList", "main", [], "refused")
    assert len(await trail.entries()) == MAX_REFUSALS + 2


async def test_entries_go_after_a_year(database):
    clock = ManualClock()
    trail = AuditTrail(database, clock)
    await trail.record(ANN, "SecretDelete", "main", [])
    clock.advance(KEPT_S - 10)
    await trail.record(ANN, "AppStop", "main", [])
    assert len(await trail.entries()) == 2
    clock.advance(CLEAN_S + 1)
    await trail.record(ANN, "AppStop", "main", [])
    assert [one.action for one in await trail.entries()] == ["AppStop", "AppStop"]
    assert [one.action for one in await trail.entries(since=clock.now() - 1)] == ["AppStop"]
