"""What the doctor says of the images that were looked at."""

from collections import Counter
from collections.abc import Mapping
from pathlib import PurePath

from vmf_pretrain.config.run import Config
from vmf_pretrain.data.bad_images import first_names
from vmf_pretrain.data.source import Source
from vmf_pretrain.doctor.finding import Finding, counted, fine, note, problem
from vmf_pretrain.doctor.images import Equal, Look
from vmf_pretrain.engine.bad_images import SUPPOSED

SPLITS = {"train", "training", "val", "valid", "validation", "test"}
SMALL_SHARE = 0.1  # of images smaller than the views, from which it is worth a word
SLOW_READING = 0.02  # seconds a file: a disk that turns, or a network
SHOWN_PAIRS = 3


def judge_look(look: Look, config: Config) -> list[Finding]:
    """Readable or not, formats and sizes, and how fast they are read; for a run with these settings."""
    global_size = config.views.global_size
    which = "all" if look.looked == look.count else f"{look.looked:,} of {look.count:,}, drawn at random,"
    found = [_readable(look, config, which)]
    if look.median_side is None:
        return found
    kinds = ", ".join(f"{count} {name}" for name, count in [*look.formats.most_common(), *look.modes.most_common()])
    found.append(fine("formats", f"{kinds}; shorter sides of {min(look.sides)} to {max(look.sides)} pixels"))
    small = sum(side < global_size for side in look.sides) / len(look.sides)
    if small > SMALL_SHARE:
        words = f"{small:.0%} of the images are smaller than the views of {global_size} pixels, and are enlarged"
        advice = "remove those that show too little; the others are larger"
        if look.median_side < global_size:
            advice = f"lower views.global_size towards {look.median_side} (a multiple of backbone.patch_size)"
        found.append(note("image sizes", words, advice))
    read, decoded = look.reading / look.looked, look.decoding / look.looked
    words = f"{1000 * read:.1f} ms a file, and {1000 * decoded:.1f} ms to decode it"
    if read > max(SLOW_READING, decoded):
        found.append(note("reading", words, "copy the images to a local disk, or pack them into tar shards"))
    else:
        found.append(fine("reading", words))
    return found


def judge_equal(equal: Equal, source: Source) -> Finding:
    """Images that are there twice."""
    labels, _ = source.labels()
    subject, scope = "duplicates", ""
    if equal.compared < equal.candidates:
        scope = f" ({equal.compared:,} of {equal.candidates:,} files of equal size were compared)"
    if not equal.groups:
        return fine(subject, f"no two files have the same bytes{scope}")
    copies = sum(len(group) - 1 for group in equal.groups)
    across = [] if labels is None else [group for group in equal.groups if len(set(labels[list(group)].tolist())) > 1]
    shown = (across or equal.groups)[:SHOWN_PAIRS]
    pairs = "; ".join(f"{source.names[group[0]]} = {source.names[group[1]]}" for group in shown)
    words = f"{counted(copies, 'file')} with the bytes of another one{scope}, such as {pairs}"
    if across:
        words += f"; in more than one class: {counted(len(across), 'image')}"
        return note(subject, words, "remove them from the wrong class: k-NN accuracy counts them as mistakes")
    return note(subject, words, "remove them: a copy that is held out is found by its twin, which flatters k-NN")


def judge_classes(source: Source, kind: str) -> list[Finding]:
    """Labels, and classes that are no classes."""
    labels, names = source.labels()
    skipped = ", ".join(f"{count} {what}" for what, count in source.skipped.items() if count)
    found = [note("images", text.rstrip("."), "mend it, or leave it as it is") for text in source.notes]
    found.append(fine("images", f"{len(source.names):,}; skipped: {skipped or 'nothing'}"))
    if labels is None:
        return [*found, _unlabelled(source, kind)]
    sizes = dict(zip(names, labels.bincount(minlength=len(names)).tolist(), strict=True))
    found.append(fine("classes", f"{len(names)}, of {min(sizes.values()):,} to {max(sizes.values()):,} images"))
    if {name.lower() for name in names} <= SPLITS:
        words = f"the sub-folders {', '.join(names)} are taken for classes, but seem to be a split"
        found.append(note("classes", words, f"give one of them: --data .../{names[0]}"))
    return found + _alone(sizes)


def _alone(sizes: Mapping[str, int]) -> list[Finding]:
    alone = [name for name, count in sizes.items() if count == 1]
    if not alone:
        return []
    words = f"with a single image, which no other one can be compared with: {first_names(alone)}"
    return [note("classes", words, "give them more images, or remove them; k-NN counts such an image as a mistake")]


def _unlabelled(source: Source, kind: str) -> Finding:
    off = "so there are no labels, and k-NN and linear accuracy are off"
    if kind != "folder":
        return note("classes", f"not every image has one, {off}", "training needs none; add a .cls to every image")
    inner = Counter(path.parts[0] if len(path.parts) > 1 else None for path in map(PurePath, source.names))
    outside = inner.pop(None, 0)
    if not inner:
        words = f"all images lie in one folder, {off}"
    elif outside:
        words = f"{counted(outside, 'image')} beside the {counted(len(inner), 'sub-folder')}, {off}"
    else:
        words = f"all images lie in the one sub-folder {next(iter(inner))}, {off}"
    return note("classes", words, "training needs none; if there are classes, give each a sub-folder")


def _readable(look: Look, config: Config, which: str) -> Finding:
    if not look.bad:
        return fine("readable", f"{which} can be decoded")
    named = first_names([image.name for image in look.bad])
    words = f"{len(look.bad)} of {counted(look.looked, 'image')} cannot be decoded: {named} ({look.bad[0].reason})"
    share, most = len(look.bad) / look.looked, config.data.max_bad_share
    # as engine/bad_images.py: a share of all that the run reads, and of SUPPOSED images at least
    if share > most and share * look.count * config.train.epochs > most * SUPPOSED:
        return problem("readable", f"{words}; data.max_bad_share allows {most:.2%}", "mend or remove them")
    return note("readable", words, "mend or remove them; in training another image takes the place of each")
