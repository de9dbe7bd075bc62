"""audit: what is on disk, against what every stage before it has on disk and what its run said of it.

The checks that a stage runs when it publishes (`stages.verify`) look at that stage. An audit comes later, from another
process, and looks at the whole chain of ledgers behind an archive, and at merged indexes.

Here: one archive, its bytes, one merged index. Not here: which of them are due, and where results go
(`orchestration.audit`).
"""

from __future__ import annotations

import io
import json
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from md_assets.core.errors import MdAssetsError, one_line
from md_assets.core.ledger import Ledger
from md_assets.core.names import first_of
from md_assets.core.paths import StageDir
from md_assets.core.spec import DatasetSpec
from md_assets.core.verdict import AUDITED, BEGIN_FACT, DIRECTORY_FACT, STAGE_FACT, Verdict
from md_assets.stages.index import METADATA_KEY, archive_folder
from md_assets.stages.verify import latents_fault, listing_fault, promised_shapes, size_fault
from md_assets.storage.mds import ledgered_files, row_count, spread_rows
from md_assets.storage.publish import is_busy, output_file, read_ledger

ROWS_PER_DECODED = 100
"""Of so many rows one is decoded, and the last one of all."""

JPEG_SCALE = 8
"""Pictures are decoded at an eighth of their size: all of their bytes are read, at a fraction of the cost."""

JPEG_FORMATS = ("JPEG", "MPO")
"""What Pillow calls them; MPO are those of cameras that put a second picture behind the first."""

_UNSOUND = (MdAssetsError, OSError, AttributeError, KeyError, TypeError, ValueError, struct.error)
"""What reading damaged files raises."""


@dataclass(frozen=True)
class Said:
    """What the run that published an archive recorded of it.

    Attributes:
        content_id: the beginning of the ledger's.
        fingerprint: of the settings.
        kept: samples.
    """

    content_id: str
    fingerprint: str
    kept: int


def chain_to(stages: Sequence[tuple[StageDir, StageDir | None]], stage_dir: StageDir) -> tuple[StageDir, ...]:
    """The stages from raw to `stage_dir`, each read by the next.

    Args:
        stages: of the dataset, as `stages.status.stages_of` gives them.
    """
    upstream = dict(stages)
    chain: list[StageDir] = []
    step: StageDir | None = stage_dir
    while step is not None:
        chain.insert(0, step)
        step = upstream[step]
    return tuple(chain)


def audit_archive(chain: Sequence[StageDir], archive: str, said: Said | None = None) -> Verdict:
    """Read an archive again: its shards, and the ledgers of its stage and of all stages before it.

    Bytes are compared by `hash_files`; here only sizes are. Data that were pruned are passed over, their ledgers not.

    Args:
        chain: of `chain_to`; the last one is the archive's stage, mds or latents.
        archive: its ID.
        said: what its run recorded, where that is known.

    Returns: the verdict `audited`, with the first fault that was found and the stage in which it lies; a fault of what
        was being made again meanwhile is for the caller to tell, see `state_of`.
    """
    stage_dir = at = chain[-1]
    ledgers: list[Ledger] = []
    decoded = 0
    try:
        for at in chain:
            ledgers.append(_ledger(at, archive))
        fault = _said_fault(ledgers[-1], said)
        if not fault:
            at, fault = _chain_fault(chain, ledgers)
        if not fault and not ledgers[-1].pruned:
            fault = size_fault(stage_dir, ledgers[-1]) or _shards_fault(stage_dir, ledgers[-1])
            if not fault:
                decoded, at, fault = _decode(chain, ledgers)
    except _UNSOUND as error:
        fault = f"{error!s} is missing" if isinstance(error, KeyError) else str(error)
    if fault:
        return _failed(chain, archive, at, fault)
    own = ledgers[-1]
    facts = {"rows": own.kept, "rows_decoded": decoded, "bytes": own.bytes_out, "stages": " → ".join(_names(chain))}
    if own.pruned:
        return Verdict(AUDITED, True, f"{_counts(ledgers)}; its data were pruned on {own.pruned.at}", facts)
    return Verdict(AUDITED, True, f"{_counts(ledgers)}; {decoded} rows decoded", facts)


def hash_files(
    chain: Sequence[StageDir], archive: str, start: int, go_on: Callable[[], bool]
) -> tuple[int, bool, Verdict | None]:
    """Compare the bytes of an archive with the hashes of its ledger, file by file.

    Args:
        chain: as for `audit_archive`; the bytes are those of the last stage.
        start: files that were compared before.
        go_on: asked before each file whether there is time for it.

    Returns: files compared so far, whether these are all, and the verdict if one differs.
    """
    stage_dir = chain[-1]
    try:
        ledger = _ledger(stage_dir, archive)
        files = () if ledger.pruned else ledger.files
        for number in range(start, len(files)):
            if not go_on():
                return number, False, None
            path = stage_dir.path / files[number].path
            if output_file(path, files[number].path) != files[number]:
                what = f"{path} does not hash to what its ledger says"
                return number, True, _failed(chain, archive, stage_dir, what)
    except _UNSOUND as error:
        return start, True, _failed(chain, archive, stage_dir, str(error))
    return len(files), True, None


def audit_index(stage_dir: StageDir, spec: DatasetSpec, merged_s: float) -> Verdict:
    """Compare the merged indexes of a stage with the ledgers of its archives.

    Args:
        stage_dir: of mds or latents.
        merged_s: Unix time at which the merge began. Archives whose ledger is newer are passed over: they were made or
            made again since, and the next merge takes them.

    Returns: the verdict `audited`; it fails if an archive that was published then with the index's settings is not
        listed, or one is listed with other shards or rows than it has.
    """
    listed = samples = 0
    faults: list[str] = []
    found = [split for split in spec.splits or ("",) if stage_dir.index(split).exists()]
    try:
        for split in found:
            archives = [archive for archive in spec.archives if spec.split_of(archive) == split]
            of_split = _IndexAudit(stage_dir, split, archives, merged_s)
            faults += of_split.faults()
            listed, samples = listed + of_split.listed, samples + of_split.samples
    except _UNSOUND as error:
        faults.append(f"{error!s} is missing" if isinstance(error, KeyError) else str(error))
    asset = f"{stage_dir.asset}_index"
    remedy = {"remedy": f"Materialize {spec.slug}/{asset}", STAGE_FACT: asset, BEGIN_FACT: asset}
    if not found:
        return Verdict(AUDITED, False, f"there is no merged index below {stage_dir.path}", remedy)
    if faults:
        return Verdict(AUDITED, False, one_line("; ".join(faults)), remedy)
    facts = {"archives": listed, "samples": samples}
    return Verdict(AUDITED, True, f"{samples} samples of {listed} archives, as their ledgers say", facts)


def state_of(chain: Sequence[StageDir], archive: str) -> tuple[tuple[int, int], ...] | None:
    """Changes whenever an archive is made again in any stage of `chain`; None while somebody works on it.

    A fault that was found while this changed says nothing.
    """
    ledgers = [step.ledger(archive) for step in chain]
    if any(is_busy(ledger) for ledger in ledgers):
        return None
    stats = [ledger.stat() if ledger.exists() else None for ledger in ledgers]
    return tuple((stat.st_mtime_ns, stat.st_ino) if stat else (0, 0) for stat in stats)


class _IndexAudit:
    """The merged index of one split, see `audit_index`."""

    def __init__(self, stage_dir: StageDir, split: str, archives: Sequence[str], merged_s: float) -> None:
        self._stage_dir = stage_dir
        self._path = stage_dir.index(split)
        self._folders = {archive.removeprefix(f"{split}/") if split else archive: archive for archive in archives}
        self._merged_s = merged_s
        self.listed = self.samples = 0

    def faults(self) -> Iterator[str]:
        """What is wrong, and the numbers of what is listed once all was asked for."""
        index = json.loads(self._path.read_bytes())
        fingerprint = index[METADATA_KEY]["fingerprint"]
        listed: dict[str, list[Mapping[str, Any]]] = {}
        for shard in index["shards"]:
            listed.setdefault(archive_folder(shard), []).append(shard)
        self.listed = len(listed)
        self.samples = sum(shard["samples"] for shard in index["shards"])
        if strange := [folder for folder in listed if folder not in self._folders]:
            yield f"{self._path} lists what is no archive: {first_of(strange)}"
        left_out = []
        for folder, archive in self._folders.items():
            ledger_path = self._stage_dir.ledger(archive)
            if not ledger_path.exists():
                if folder in listed:
                    yield f"{self._path} lists {archive}, which is not published"
                continue
            if ledger_path.stat().st_mtime >= self._merged_s:
                continue
            ledger = _ledger(self._stage_dir, archive)
            if folder in listed:
                if fault := listing_fault(self._stage_dir, ledger, listed[folder], fingerprint):
                    yield f"{self._path} lists {archive}: {fault}"
            elif ledger.fingerprint == fingerprint and ledger.kept and not ledger.pruned:
                left_out.append(archive)
        if left_out:
            yield f"{self._path} leaves out {len(left_out)} archives that were published: {first_of(left_out)}"


def _said_fault(ledger: Ledger, said: Said | None) -> str | None:
    """In what a ledger is not the one that its run recorded."""
    if said is None:
        return None
    if ledger.fingerprint != said.fingerprint:
        return (
            f"it was made with other settings than its run recorded (fingerprint {ledger.fingerprint}, not "
            f"{said.fingerprint})"
        )
    if not ledger.content_id.startswith(said.content_id) or ledger.kept != said.kept:
        return f"the ledger is not the one that its run recorded: {ledger.kept} kept, not {said.kept}, or other files"
    return None


def _chain_fault(chain: Sequence[StageDir], ledgers: Sequence[Ledger]) -> tuple[StageDir, str | None]:
    """What does not follow from stage to stage, and in which of them: counts, settings, contents."""
    for number, (step, ledger) in enumerate(zip(chain, ledgers, strict=True)):
        if not ledger.balances:
            rejected = ledger.rejected_count
            return step, f"{step.asset}: {ledger.read} read, but {ledger.kept} kept + {rejected} rejected"
        if number:
            upstream, before = chain[number - 1], ledgers[number - 1]
            if ledger.read != before.kept:
                return step, f"{upstream.asset} kept {before.kept}, {step.asset} read {ledger.read}"
            if any(ledger.settings.get(name) != value for name, value in before.settings.items()):
                return step, f"{step.asset} was made with other settings than {upstream.asset}"
            if ledger.inputs.get(upstream.stage) != before.content_id:
                return step, f"{step.asset} was made of another {upstream.asset} than the one that is there"
    return chain[-1], None


def _shards_fault(stage_dir: StageDir, ledger: Ledger) -> str | None:
    """In what the index of an archive is not that of its ledger."""
    data = stage_dir.data(ledger.archive)
    rows = row_count(data)
    if rows != ledger.kept:
        return f"{rows} rows in the index of {stage_dir.asset}, {ledger.kept} in the ledger"
    if ledgered_files(data, ledger.archive) != ledger.files:
        return f"the index of {stage_dir.asset} is not the one of the ledger"
    return None


def _decode(chain: Sequence[StageDir], ledgers: Sequence[Ledger]) -> tuple[int, StageDir, str | None]:
    """Decode every 100th row; of latents also compare it with the row of mds that it was made of.

    Returns: rows decoded, the first fault, and before it the stage in which it lies.
    """
    stage_dir, ledger = chain[-1], ledgers[-1]
    count = -(-ledger.kept // ROWS_PER_DECODED) + 1
    rows = spread_rows(stage_dir.data(ledger.archive), count)
    origins: Iterator[Mapping[str, Any]] | None = None
    if stage_dir.stage == "latents" and not stage_dir.subset and _is_whole(chain[-2], ledgers[-2]):
        rejected = {key for keys in ledger.rejected.values() for key in keys}
        origins = spread_rows(chain[-2].data(ledger.archive), count, rejected)  # as many rows: the same positions
    shapes = promised_shapes(ledger) if stage_dir.stage == "latents" else {}
    decoded = 0
    for row in rows:
        if shapes:
            text_storage = ledger.details.get("text_storage", "full")
            fault = latents_fault(row, shapes, ledger.details["dtype"], text_storage)
            if not fault and origins is not None:
                try:
                    origin = next(origins)
                except _UNSOUND as error:
                    return decoded, chain[-2], f"{chain[-2].asset}, the row of sample {row['key']}: {error}"
                fault = _origin_fault(row, origin)
        else:
            fault = _picture_fault(row)
        if fault:
            return decoded, stage_dir, f"{stage_dir.asset}, sample {row.get('key')}: {fault}"
        decoded += 1
    return decoded, stage_dir, None


def _origin_fault(row: Mapping[str, Any], origin: Mapping[str, Any]) -> str | None:
    """In what a row of latents is not that of its image."""
    for column in ("key", "caption", "width", "height"):
        if row[column] != origin[column]:
            return f"in mds the same row has another {column}, that of {origin['key']}"
    return None


def _picture_fault(row: Mapping[str, Any]) -> str | None:
    """What is wrong with the picture of a row of mds."""
    from PIL import Image

    try:
        with Image.open(io.BytesIO(row["jpg"])) as picture:
            width, height = picture.size
            if picture.format not in JPEG_FORMATS or picture.size != (row["width"], row["height"]):
                return f"its picture is a {picture.format} of {width}×{height} px, not {row['width']}×{row['height']}"
            picture.draft("RGB", (width // JPEG_SCALE, height // JPEG_SCALE))
            picture.load()
    except (OSError, SyntaxError, ValueError) as error:  # what Pillow raises of bytes that are no picture
        return str(error)
    return None


def _is_whole(stage_dir: StageDir, ledger: Ledger) -> bool:
    return not ledger.pruned and size_fault(stage_dir, ledger) is None


def _ledger(stage_dir: StageDir, archive: str) -> Ledger:
    ledger = read_ledger(stage_dir.ledger(archive))
    if ledger is None:
        raise MdAssetsError(f"{stage_dir.asset} is not published")
    return ledger


def _names(chain: Sequence[StageDir]) -> list[str]:
    return [step.asset for step in chain]


def _counts(ledgers: Sequence[Ledger]) -> str:
    """E.g. `12 read, kept 7 → 6`."""
    return f"{ledgers[0].read} read, kept {' → '.join(str(ledger.kept) for ledger in ledgers)}"


def _failed(chain: Sequence[StageDir], archive: str, at: StageDir, fault: str) -> Verdict:
    """The verdict on a fault that lies in the stage `at`.

    What the stage reads must be there to make the archive again, so stages before it that were pruned come first.
    """
    begin = chain.index(at)
    while begin and _is_pruned(chain[begin - 1], archive):
        begin -= 1
    facts = {STAGE_FACT: at.asset, BEGIN_FACT: chain[begin].asset, DIRECTORY_FACT: at.path.name}
    return Verdict(AUDITED, False, one_line(fault), {"remedy": f"md-assets backfill {at.dataset} --failed", **facts})


def _is_pruned(stage_dir: StageDir, archive: str) -> bool:
    try:
        return _ledger(stage_dir, archive).pruned is not None
    except _UNSOUND:
        return False
