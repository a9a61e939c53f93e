"""The model registry: a version per evaluated candidate, and which of them serves.

Aliases say what a version is, never stages:

``challenger``         the candidate of the latest day
``champion``           the latest candidate that the gate promoted: what scoring and serving load
``previous_champion``  what a rollback returns to

Rules of the champion:

* only a verdict of the gate on exactly the scores that lie in the run folder moves it,
  and only to the very files that were evaluated;
* a person may force it with a reason, which is recorded: then neither the verdict nor a
  champion of a later day holds it back.  A reason counts once: a run that is repeated
  does not return a forced version to a place that another has taken since;
* the champion is read again right before the swap.  If it is not the one the candidate
  was compared with, the comparison is repeated with the new one first;
* a day never replaces a champion trained for a later day, so a backfill cannot move
  it back;
* a version that a person rolled back is never promoted again by the pipeline.

MLflow has no compare-and-swap.  Processes of one machine take turns by a file lock;
between machines the order is the scheduler's business (one promotion at a time),
and the alias is read once more after it was set.

A step that is repeated finds its version by its tags and registers nothing twice.
"""

from __future__ import annotations

import argparse
import hashlib
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, Literal

from onetrans import storage
from onetrans.errors import BadConfigError, BadDataError, NotReadyError, PipelineError
from onetrans.forced import add_force_argument, forced_reason
from onetrans.plan import GATE_FILE, PAGE_FILE, PROMOTION_FILE, SCORES_FILE, Plan
from onetrans.process import add_json, print_json
from onetrans.progress import long_steps
from onetrans.scores import CANDIDATE
from onetrans.settings import MlflowSettings, Settings, load_settings
from onetrans.tracking import (
    MODEL_FOLDER,
    TAG_DAY,
    TAG_DECISION,
    TAG_FORCED,
    TAG_MODEL_DIGEST,
    TAG_MODEL_ID,
    TAG_PLAN,
    answering,
    connect,
    fetched_folder,
    find_model_run,
    folder_digest,
    log_promotion,
    one_at_a_time,
    see_run,
)
from onetrans.trial import decision_of_day, results_folder
from onetrans.verdict_page import with_outcome

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion, RegisteredModel

logger = logging.getLogger(__name__)


CHAMPION = "champion"
CHALLENGER = "challenger"
PREVIOUS = "previous_champion"

TAG_VERDICT = "gate_verdict"
TAG_REPLACED = "replaced"
TAG_ROLLED_BACK = "rolled_back"
TAG_PROMOTED = "promoted_at"
TAG_BY_HAND = "promoted_by_hand"
TAG_RETURNED = "returned_by_rollback"
TAG_PARENT = "parent_version"

MOST_COMPARISONS = 3
"""Times a comparison is repeated because the champion moved meanwhile."""

EXAMPLES = """examples:
  onetrans promote --plan var/runs/ds=2022-05-06/1a2b3c4d5e6f
  onetrans promote --plan var/runs/ds=2022-05-06/1a2b3c4d5e6f --force "the baseline was trained on a broken log"
  onetrans registry list"""


class Registry:
    """The registered model of a deployment."""

    def __init__(self, settings: MlflowSettings) -> None:
        self.settings = settings
        self.name = settings.registered_model

    @property
    def client(self) -> MlflowClient:
        """The client; made on first use."""
        return connect(self.settings)

    # Reading

    def by_alias(self, alias: str) -> ModelVersion | None:
        """Return the version an alias names now, or None; a search would return it without its aliases."""
        from mlflow.exceptions import MlflowException

        try:
            return self.client.get_model_version_by_alias(self.name, alias)
        except MlflowException as error:
            # A missing alias is answered with INVALID_PARAMETER_VALUE, a missing model with the other.
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return None
            raise

    def version(self, number: str) -> ModelVersion:
        """Return a version by its number.

        Raises:
            BadConfigError: if there is none.
        """
        from mlflow.exceptions import MlflowException

        try:
            return self.client.get_model_version(self.name, number)
        except MlflowException as error:
            if error.error_code not in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                raise
            raise BadConfigError(f"{self.name} has no version {number}; see: onetrans registry list") from error

    def versions(self) -> list[ModelVersion]:
        """Return all versions, newest first."""
        found: list[ModelVersion] = []
        token: str | None = None
        while True:
            page = self.client.search_model_versions(f"name='{self.name}'", max_results=200, page_token=token)
            found += page
            token = page.token
            if not token:
                return sorted(found, key=lambda version: int(version.version), reverse=True)

    def exists(self) -> bool:
        """Tell whether a version was ever registered under this name."""
        return self._model() is not None

    def aliases(self) -> dict[str, str]:
        """Return every alias and the number of the version it names."""
        model = self._model()
        return {} if model is None else {alias: str(number) for alias, number in model.aliases.items()}

    def _model(self) -> RegisteredModel | None:
        from mlflow.exceptions import MlflowException

        try:
            return self.client.get_registered_model(self.name)
        except MlflowException as error:
            if error.error_code == "RESOURCE_DOES_NOT_EXIST":
                return None
            raise

    # Writing

    def register(self, model_id: str, run_id: str, tags: Mapping[str, str], description: str) -> ModelVersion:
        """Return the version of a logged model; it is registered on first use, later its tags are renewed."""
        from mlflow.exceptions import MlflowException

        try:
            self.client.create_registered_model(self.name, description="Ranking model, one version per evaluated day.")
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
        for version in self.versions():
            if version.tags.get(TAG_MODEL_ID) == model_id:
                for tag, value in tags.items():
                    self.client.set_model_version_tag(self.name, version.version, tag, value)
                self.client.update_model_version(self.name, version.version, description)
                return self.version(version.version)
        return self.client.create_model_version(
            self.name,
            source=f"models:/{model_id}",
            run_id=run_id,
            tags={**tags, TAG_MODEL_ID: model_id},
            description=description,
            model_id=model_id,
        )

    def set_champion(self, version: ModelVersion) -> None:
        """Make a version the champion and remember which one it replaced; one that is killed may be repeated.

        Raises:
            PipelineError: if another process set the alias at the same time.
        """
        before = self.by_alias(CHAMPION)
        if before is not None and before.version != version.version:
            self._tag(version, TAG_REPLACED, str(before.version))
            self.client.set_registered_model_alias(self.name, PREVIOUS, before.version)
        self.client.set_registered_model_alias(self.name, CHAMPION, version.version)
        self.tag_promoted(version)
        after = self.by_alias(CHAMPION)
        if after is None or after.version != version.version:
            raise PipelineError(
                f"{self.name}: alias {CHAMPION} was set to version {version.version} and names "
                f"{after.version if after else 'none'} now; another promotion ran at the same time"
            )

    def tag_promoted(self, version: ModelVersion) -> None:
        """Note that a version became the champion now."""
        self._tag(version, TAG_PROMOTED, _now())

    def tag_forced(self, version: ModelVersion, reason: str) -> None:
        """Note why a person made a step's version the champion; after the time of its promotion."""
        self._tag(version, TAG_FORCED, f"{_now()}: {reason}")

    def promote_by_hand(self, number: str, reason: str) -> ModelVersion:
        """Make a version the champion because a person says so; the reason is kept in its tags.

        A champion of the same or a later day that has to leave for it is set aside like one that is rolled back: a
        run of its day that is repeated does not promote it again.

        Raises:
            BadConfigError: if there is no such version or no reason.
            BadDataError: if its files are gone or changed.
        """
        reason = _given(reason)
        with one_at_a_time(self.settings.tracking_uri):
            version = self.version(number)
            self.check_files(version)
            leaving = self.by_alias(CHAMPION)
            later = leaving is not None and leaving.tags.get(TAG_DAY, "") >= version.tags.get(TAG_DAY, "")
            if leaving is not None and later and leaving.version != version.version:
                self._tag(leaving, TAG_ROLLED_BACK, f"{_now()}: for version {version.version}: {reason}")
            self.set_champion(version)
            self._tag(version, TAG_BY_HAND, f"{_now()}: {reason}")
            if TAG_ROLLED_BACK in version.tags:
                self.client.delete_model_version_tag(self.name, version.version, TAG_ROLLED_BACK)
        return self.version(number)

    def roll_back(self, reason: str) -> tuple[ModelVersion, ModelVersion]:
        """Return the champion's place to the version it had replaced; (what was champion, what is now).

        The version that leaves is tagged with the reason, and the pipeline will not promote it again.
        Rolling back twice goes back two promotions; a version that was rolled back before is stepped over.
        The champion moves last, so a rollback that is killed may be repeated.

        Raises:
            BadConfigError: if there is no champion, nothing before it, or no reason.
            BadDataError: if the files of the version before are gone or changed; nothing has moved then.
        """
        reason = _given(reason)
        with one_at_a_time(self.settings.tracking_uri):
            leaving = self.by_alias(CHAMPION)
            if leaving is None:
                raise BadConfigError(f"{self.name} has no champion, so there is nothing to roll back")
            returning = self._before(leaving)
            if returning is None:
                raise BadConfigError(
                    f"{self.name}: there is no champion before version {leaving.version} that was not rolled back; "
                    "name one: onetrans registry promote --version N --reason TEXT"
                )
            self.check_files(returning)
            earlier = self._before(returning, leaving)
            self._tag(leaving, TAG_ROLLED_BACK, f"{_now()}: {reason}")
            self._tag(returning, TAG_RETURNED, f"{_now()}: version {leaving.version} was rolled back: {reason}")
            if earlier is not None:
                self.client.set_registered_model_alias(self.name, PREVIOUS, earlier.version)
            elif PREVIOUS in self.aliases():
                self.client.delete_registered_model_alias(self.name, PREVIOUS)
            self.client.set_registered_model_alias(self.name, CHAMPION, returning.version)
        return self.version(leaving.version), self.version(returning.version)

    def _before(self, version: ModelVersion, *also: ModelVersion) -> ModelVersion | None:
        """Return the latest champion before a version that was not rolled back.

        The versions' own tags say who replaced whom, as the alias may lag behind them after a kill; it is asked
        where there is no tag, for a champion whose alias somebody set in MLflow.

        Args:
            version: where to begin.
            also: versions that are not looked for.
        """
        seen = {str(v.version) for v in (version, *also)}
        number = version.tags.get(TAG_REPLACED) or self.aliases().get(PREVIOUS)
        while number is not None and number not in seen:
            seen.add(number)
            found = self.version(number)
            if TAG_ROLLED_BACK not in found.tags:
                return found
            number = found.tags.get(TAG_REPLACED)
        return None

    def check_files(self, version: ModelVersion) -> None:
        """Check that a version can be loaded: its files are there, and those that were registered.

        Raises:
            BadDataError: if they are not.
        """
        from mlflow.exceptions import MlflowException

        if TAG_MODEL_ID not in version.tags or TAG_MODEL_DIGEST not in version.tags:
            return  # Others registered it, and nothing is known of its files.
        try:
            with fetched_folder(self.settings, version.tags[TAG_MODEL_ID], MODEL_FOLDER) as folder:
                digest = folder_digest(folder)
        except (OSError, MlflowException) as error:
            gone = getattr(error, "error_code", "") in ("", "RESOURCE_DOES_NOT_EXIST")
            if storage.is_lost(error) or not gone:
                raise
            raise BadDataError(
                f"{self.name} version {version.version}: its files cannot be read ({error}); the champion stays. Name "
                "another: onetrans registry promote --version N --reason TEXT"
            ) from error
        if digest != version.tags[TAG_MODEL_DIGEST]:
            raise BadDataError(
                f"{self.name} version {version.version}: its files are not those that were registered (SHA-256 "
                f"{digest[:12]}, expected {version.tags[TAG_MODEL_DIGEST][:12]}); the champion stays. Name another: "
                "onetrans registry promote --version N --reason TEXT"
            )

    def _tag(self, version: ModelVersion, tag: str, value: str) -> None:
        self.client.set_model_version_tag(self.name, version.version, tag, value)


def came_to_serve(tags: Mapping[str, str]) -> tuple[str | None, str | None]:
    """Return since when a champion serves, and the words of the person who put it there; None: nobody, the gate did.

    Args:
        tags: of its version.
    """
    promoted = tags.get(TAG_PROMOTED)
    # Each is "time: words", and written after the time of a promotion that it explains.
    by_person = max((tags[tag] for tag in (TAG_BY_HAND, TAG_FORCED, TAG_RETURNED) if tag in tags), default="")
    when, _, words = by_person.partition(": ")
    if by_person and when >= (promoted or ""):
        return when, words
    return promoted, None


# The step


def promote(settings: Settings, plan: Plan, force: str = "") -> dict[str, Any]:
    """Register a plan's candidate, move the aliases its verdict allows, and return the content of ``promotion.json``.

    A trial (:mod:`onetrans.trial`) changes nothing and returns what the day's decision was.

    Args:
        settings: where MLflow is, and the gate's thresholds should the comparison be repeated.
        plan: the judged plan.
        force: why a person has it promoted whatever the verdict and the champion's day are; empty: nobody does.

    Raises:
        NotReadyError: if the plan was not judged, or scored again since, its candidate is not in MLflow, or the
            registry does not answer.
        BadDataError: if the model is not the one that was evaluated, or the champion's files are gone.
        BadConfigError: if the plan was made without MLflow.
        PipelineError: if the champion moved each time it was compared with.
    """
    if not plan.mlflow_run_id:
        raise BadConfigError(f"plan {plan.plan_id} of {plan.ds} was made without MLflow; there is nothing to register")
    with answering(settings.mlflow):
        see_run(settings.mlflow, plan.mlflow_run_id)
        if settings.gate.mode != "enabled" and (done := decision_of_day(plan)) is not None:
            return _left_as_it_is(settings, plan, done)
        for _ in range(MOST_COMPARISONS):
            promotion = _promote_once(settings, plan, force.strip())
            if promotion is not None:
                return promotion
            _compare_again(settings, plan, force.strip())
    raise PipelineError(
        f"{settings.mlflow.registered_model}: the champion moved during each of {MOST_COMPARISONS} comparisons; "
        "another process promotes or rolls back at the same time. Nothing was promoted; run this step again"
    )


def _left_as_it_is(settings: Settings, plan: Plan, decision: dict[str, Any]) -> dict[str, Any]:
    """Return what was decided before, and say that a trial leaves it."""
    done = _as_of_now(Registry(settings.mlflow), decision)
    trial = storage.join(results_folder(settings, plan), GATE_FILE)
    told = f" Its verdict: {storage.read_json(trial)['reason']}" if storage.exists(trial) else ""
    by = "" if done["plan_id"] == plan.plan_id else f" by plan {done['plan_id']}"
    left = f"what was decided at {done['finished_at']}{by} ({done['reason']})"
    return done | {"reason": f"gate.mode = {settings.gate.mode} leaves {left} as it is.{told}"}


def _promote_once(settings: Settings, plan: Plan, force: str) -> dict[str, Any] | None:
    """Do all of it by the verdict as it is; None if the champion is not the one that was compared."""
    verdict = _read_verdict(plan)
    run = find_model_run(settings, plan, CANDIDATE)
    tags = run.data.tags if run is not None else {}
    if run is None or TAG_MODEL_ID not in tags:
        raise NotReadyError(
            f"{CANDIDATE} of {plan.ds} is not in MLflow; run: onetrans train --plan {plan.path} --model {CANDIDATE}"
        )
    registry = Registry(settings.mlflow)
    done = _done_before(registry, plan, verdict, tags[TAG_MODEL_ID])
    # What the gate declined and is recorded as promoted for no reason may have lost it: a try that was killed.
    open_to_force = done is not None and (
        done["decision"] in ("held", "declined") or (done["verdict"] != "promoted" and not done["forced"])
    )
    if done is not None and not (force and open_to_force):
        return _as_of_now(registry, done)
    _check_same_model(settings, plan, tags[TAG_MODEL_ID], tags[TAG_MODEL_DIGEST])
    with one_at_a_time(settings.mlflow.tracking_uri):
        if _moved(registry.by_alias(CHAMPION), plan, verdict, bool(force)):
            return None
        version = registry.register(
            tags[TAG_MODEL_ID],
            run.info.run_id,
            _version_tags(plan, verdict, tags) | {TAG_PARENT: _parent_version(registry, plan)},
            model_card(plan, verdict, registry.name),
        )
        _move_challenger(registry, version, plan)
        move = _move_champion(registry, version, plan, verdict, force)
        aliases = registry.aliases()
    promotion = {
        "ds": str(plan.ds),
        "plan_id": plan.plan_id,
        "model": registry.name,
        "version": str(version.version),
        "model_id": tags[TAG_MODEL_ID],
        "model_digest": tags[TAG_MODEL_DIGEST],
        "verdict": verdict["verdict"],
        "decision": move.decision,
        "reason": move.reason,
        "forced": force if move.forced else None,
        "mode": verdict["mode"],
        "aliases": sorted(alias for alias, number in aliases.items() if number == str(version.version)),
        "champion_before": move.before,
        "champion_after": aliases.get(CHAMPION),
        "compared_with": verdict["champion"],
        "gate_decided_at": verdict["decided_at"],
        "finished_at": _now(),
    }
    registry.client.set_model_version_tag(registry.name, version.version, TAG_DECISION, move.decision)
    storage.write_json(storage.join(plan.path, PROMOTION_FILE), promotion)
    log_promotion(settings, plan, promotion, _amend_page(plan, promotion))
    return promotion


def _amend_page(plan: Plan, promotion: Mapping[str, Any]) -> str | None:
    """Have the verdict's page say what became of it, where that is not what the gate decided."""
    path = storage.join(plan.path, PAGE_FILE)
    if promotion["decision"] == promotion["verdict"] or not storage.exists(path):
        return None
    page = with_outcome(storage.read_bytes(path).decode(), promotion["decision"], promotion["reason"])
    storage.write_bytes(path, page.encode())
    return page


def _as_of_now(registry: Registry, done: dict[str, Any]) -> dict[str, Any]:
    """Return what an earlier run of the step did, with what has become of its version since."""
    champion = registry.by_alias(CHAMPION)
    number = str(champion.version) if champion is not None else None
    if done["decision"] != "promoted" or number == done["version"]:
        return done
    since = {
        "aliases": sorted(alias for alias, named in registry.aliases().items() if named == done["version"]),
        "champion_after": number,
    }
    rolled_back = registry.version(done["version"]).tags.get(TAG_ROLLED_BACK)
    if rolled_back is None:
        return done | since | {"reason": f"promoted at {done['finished_at']}; another has taken its place since"}
    return done | since | {"decision": "held", "reason": _rolled_back(done["version"], rolled_back), "forced": None}


def _rolled_back(number: str, why: str) -> str:
    return (
        f"a person rolled this version back ({why}); to undo that: onetrans registry promote --version {number} "
        "--reason TEXT"
    )


def _moved(champion: ModelVersion | None, plan: Plan, verdict: Mapping[str, Any], forced: bool) -> bool:
    """Tell whether a decision would rest on a comparison with another champion than the one that serves now.

    That is: a promotion, or a refusal for the champion's sake alone.
    """
    failed = [criterion["name"] for criterion in verdict["criteria"] if not criterion["passed"]]
    for_champion = bool(failed) and all("champion" in name for name in failed)
    if champion is None or not (verdict["verdict"] == "promoted" or for_champion):
        return False
    if champion.tags.get(TAG_PLAN) == plan.plan_id or TAG_DAY not in champion.tags:
        return False
    if champion.tags[TAG_DAY] > str(plan.ds) and not forced:
        return False  # It will not be replaced.
    compared = verdict["champion"]
    return (compared["version"], compared["digest"]) != (str(champion.version), champion.tags.get(TAG_MODEL_DIGEST))


def _compare_again(settings: Settings, plan: Plan, force: str) -> None:
    from onetrans.evaluate import compare_again  # it needs torch, which the usual promotion does not
    from onetrans.gate import run_gate

    logger.info("%s: the champion moved since the day was judged; comparing with the new one", plan.ds)
    compare_again(plan, settings)
    run_gate(settings, plan, force)


def _parent_version(registry: Registry, plan: Plan) -> str:
    """Return the version whose training the candidate went on from, or why there is none."""
    start = plan.models[CANDIDATE].warm_start
    if start is None:
        return "none: fresh weights"
    parent = start.rstrip("/").rsplit("/", 2)[-2]
    for version in registry.versions():
        if version.tags.get(TAG_PLAN) == parent:
            return str(version.version)
    return f"not registered: plan {parent}"


def _done_before(registry: Registry, plan: Plan, verdict: Mapping[str, Any], model_id: str) -> dict[str, Any] | None:
    """Return what an earlier run of this step did for the same verdict, if the registry still has it."""
    path = storage.join(plan.path, PROMOTION_FILE)
    if not storage.exists(path):
        return None
    done: dict[str, Any] = storage.read_json(path)
    same = (model_id, verdict["decided_at"], verdict["mode"])
    if (done["model_id"], done["gate_decided_at"], done.get("mode", verdict["mode"])) != same:
        return None
    if all(version.tags.get(TAG_MODEL_ID) != model_id for version in registry.versions()):
        return None
    logger.info(
        "%s of %s is version %s since %s; nothing to do", CANDIDATE, plan.ds, done["version"], done["finished_at"]
    )
    return done


def _read_verdict(plan: Plan) -> dict[str, Any]:
    gate_path, scores_path = storage.join(plan.path, GATE_FILE), storage.join(plan.path, SCORES_FILE)
    if not storage.exists(gate_path):
        raise NotReadyError(f"{plan.ds} was not judged; run: onetrans gate --plan {plan.path}")
    verdict: dict[str, Any] = storage.read_json(gate_path)
    if not storage.exists(scores_path):
        raise NotReadyError(f"{scores_path} is not there; run: onetrans evaluate --plan {plan.path}")
    if hashlib.sha256(storage.read_bytes(scores_path)).hexdigest() != verdict["scores_sha256"]:
        # Another run of the same day may be between its evaluation and its verdict: then the next try finds both.
        raise NotReadyError(
            f"{gate_path} speaks of other scores than those in {SCORES_FILE}; run: onetrans gate --plan {plan.path}"
        )
    return verdict


def _check_same_model(settings: Settings, plan: Plan, model_id: str, digest: str) -> None:
    """Refuse to promote anything but the files that were evaluated."""
    evaluated = storage.join(plan.model_path(CANDIDATE), MODEL_FOLDER)
    with fetched_folder(settings.mlflow, model_id, MODEL_FOLDER) as folder:
        logged = folder_digest(folder)
    for where, found in (("the run folder", folder_digest(evaluated)), ("MLflow", logged)):
        if found != digest:
            raise BadDataError(
                f"{CANDIDATE} of {plan.ds}: the model in {where} is not the one that was trained "
                f"(SHA-256 {found[:12]}, expected {digest[:12]}); nothing was registered"
            )


def _move_challenger(registry: Registry, version: ModelVersion, plan: Plan) -> None:
    current = registry.by_alias(CHALLENGER)
    if current is None or current.tags.get(TAG_DAY, "") <= str(plan.ds):
        registry.client.set_registered_model_alias(registry.name, CHALLENGER, version.version)


@dataclass(frozen=True)
class _Move:
    """What became of the champion's place."""

    before: str | None
    """Version that held it."""
    decision: Literal["promoted", "declined", "held"]
    """``declined``: the gate said no; ``held``: something else stands against it."""
    reason: str
    """Why, a sentence or so."""
    forced: bool = False
    """Whether a person's reason was what decided."""


def _move_champion(
    registry: Registry, version: ModelVersion, plan: Plan, verdict: Mapping[str, Any], force: str
) -> _Move:
    """Swap the champion if everything allows it, or a person forces what does not."""
    champion = registry.by_alias(CHAMPION)
    before = str(champion.version) if champion is not None else None
    tags = version.tags
    if champion is not None and champion.version == version.version:
        return _repeated(registry, version, plan, verdict, force)
    declined = verdict["verdict"] != "promoted"
    if declined and not force:
        return _Move(before, "declined", verdict["reason"])
    if TAG_ROLLED_BACK in tags:
        return _Move(before, "held", _rolled_back(str(version.version), tags[TAG_ROLLED_BACK]))
    held = _not_older(champion, plan)
    if champion is not None and champion.tags.get(TAG_DAY, "") > str(plan.ds) and TAG_PROMOTED in tags:
        return _Move(tags.get(TAG_REPLACED), "promoted", f"was promoted at {tags[TAG_PROMOTED]}")
    if not (declined or held):
        registry.set_champion(version)
        return _Move(before, "promoted", verdict["reason"])
    if not force:
        return _Move(before, "held", f"{held}; to replace it all the same: --force REASON")
    if TAG_FORCED in tags:
        return _Move(
            before,
            "held",
            f"it was forced before ({tags[TAG_FORCED]}), and champion {before} has taken its place since; to force it "
            f"again: onetrans registry promote --version {version.version} --reason TEXT",
        )
    registry.set_champion(version)
    registry.tag_forced(version, force)
    return _Move(before, "promoted", _forced(_over(verdict, held), force, verdict), forced=True)


def _repeated(registry: Registry, version: ModelVersion, plan: Plan, verdict: Mapping[str, Any], force: str) -> _Move:
    """Return what made this version the champion; what a try that was killed could not note any more is noted.

    What it replaced was noted before the alias moved; when it did and a person's reason come after.
    """
    tags, previous = version.tags, registry.by_alias(PREVIOUS)
    replaced = tags.get(TAG_REPLACED)
    over = _over(verdict, _not_older(previous, plan) if previous and str(previous.version) == replaced else "")
    since = tags.get(TAG_PROMOTED)
    # A verdict that is later than the promotion does not tell how that came about.
    unexplained = tags.keys().isdisjoint({TAG_FORCED, TAG_BY_HAND, TAG_RETURNED}) and verdict["decided_at"] <= (
        since or "9"
    )
    if over and not force and not since:
        why = "it was set in MLflow, or by a try that was killed and had a reason"
        return _Move(replaced, "promoted", f"is the champion, though {over}: {why}")
    if not since:
        registry.tag_promoted(version)
    if over and force and unexplained:
        registry.tag_forced(version, force)
        return _Move(replaced, "promoted", _forced(over, force, verdict), forced=True)
    if not since:
        return _Move(replaced, "promoted", verdict["reason"])
    forced = bool(force) and tags.get(TAG_FORCED, "").endswith(f": {force}")
    return _Move(replaced, "promoted", f"is the champion since {since}; nothing was changed", forced=forced)


def _not_older(champion: ModelVersion | None, plan: Plan) -> str:
    """Return why a champion does not leave for the model of a plan; empty: it is older, or there is none."""
    if champion is None:
        return ""
    if TAG_DAY not in champion.tags:
        return f"champion {champion.version} has no tag {TAG_DAY!r}, so nothing says that it is older"
    if champion.tags[TAG_DAY] > str(plan.ds):
        return f"champion {champion.version} was trained for a later day, {champion.tags[TAG_DAY]}"
    return ""


def _over(verdict: Mapping[str, Any], held: str) -> str:
    """Return what stands against a promotion; empty: nothing."""
    return " and ".join(filter(None, ["the gate declined it" if verdict["verdict"] != "promoted" else "", held]))


def _forced(over: str, force: str, verdict: Mapping[str, Any]) -> str:
    note = f" The gate: {verdict['reason']}" if verdict["verdict"] != "promoted" else ""
    return f"forced, though {over}: {force.rstrip('.')}.{note}"


def _version_tags(plan: Plan, verdict: Mapping[str, Any], run_tags: Mapping[str, str]) -> dict[str, str]:
    return {
        TAG_DAY: str(plan.ds),
        TAG_PLAN: plan.plan_id,
        TAG_VERDICT: str(verdict["verdict"]),
        TAG_MODEL_DIGEST: run_tags[TAG_MODEL_DIGEST],
        "git_revision": plan.git_revision,
        "snapshot.training_requests": str(plan.snapshot_id),
        "schema_fingerprint": plan.schema.fingerprint,
    }


def model_card(plan: Plan, verdict: Mapping[str, Any], name: str) -> str:
    """Return the version's description: what it is, what it was trained on, how good it is, how to load it."""
    lines = [
        f"OneTrans, size `{plan.preset}`, feature schema `{plan.schema.name}` ({plan.schema.fingerprint}).",
        "",
        f"Training: {plan.decision}; snapshot {plan.snapshot_id} of `training_requests`, code {plan.git_revision}.",
        f"Evaluated on {plan.ds}: {verdict['rows']:,} impressions of {verdict['users']:,} users.",
        "",
        "| model | CTR AUC | CTR UAUC | CVR AUC | CVR UAUC |",
        "|---|---|---|---|---|",
    ]
    for model_name, figures in verdict["models"].items():
        cells = (figures[f"{task}_{kind}"] for task in ("ctr", "cvr") for kind in ("auc", "uauc"))
        lines.append(f"| {model_name} | " + " | ".join("-" if c is None else f"{c:.4f}" for c in cells) + " |")
    lines += [
        "",
        f"Gate: **{verdict['verdict']}**. {verdict['reason']} {verdict['champion']['note']}.",
        "",
        f"Load it with `mlflow.pyfunc.load_model('models:/{name}@{CHAMPION}')`; the input is described in "
        "`onetrans/requests.py`, an example lies beside the model.",
    ]
    return "\n".join(lines)


def _given(reason: str) -> str:
    if not reason.strip():
        raise BadConfigError("a reason is needed; it is kept with the version")
    return reason.strip()


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("--plan", required=True, help="folder of the plan, or its plan.json")
    add_force_argument(parser, "promote it whatever the gate's verdict and the champion's day are; the reason is kept")
    add_json(parser)


def run(arguments: argparse.Namespace) -> int:
    """Register the candidate and say what became of it; one that is not promoted is no failure."""
    settings = load_settings()
    plan, force = Plan.load(arguments.plan), forced_reason(arguments.force, settings.gate)
    with long_steps(None, f"promotion of {plan.ds}"):
        promotion = promote(settings, plan, force)
    if arguments.json:
        print_json(promotion)
        return 0
    print(
        f"{promotion['ds']} {promotion['model']} version {promotion['version']} {promotion['decision']}: "
        f"{promotion['reason']}"
    )
    print(
        f"champion: version {promotion['champion_after'] or 'none'} (before: {promotion['champion_before'] or 'none'})"
    )
    return 0
