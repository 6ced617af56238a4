"""Networks that lie elsewhere: in a repository of the Hugging Face hub that is none of the zoo's, or at an address.

What comes from the hub is kept in the hub's own cache, which other programs share; the hub is asked once a process
whether there is something newer. What comes from an address is kept in ours, and not asked for again.
"""

from __future__ import annotations

import hashlib
import re
import warnings
from pathlib import Path, PurePosixPath
from urllib.parse import unquote, urlsplit

from efficientformer.spec.errors import DownloadError, UsageError
from efficientformer.spec.preprocess import PreprocessSpec
from efficientformer.spec.whole import whole_file
from efficientformer.spec.zoo import FILE_SUFFIXES, IN_FOLDERS, WeightsSource
from efficientformer.weights.beside import CONFIG, PROCESSOR
from efficientformer.weights.cache import hub_cached
from efficientformer.weights.download import HUB_URL, Limits, fetch, hub_bar, hub_endpoint, offline_reason, say
from efficientformer.weights.progress import Progress, silent

_REPOSITORY = re.compile(r"hf[-_]hub:([\w.-]+/[\w.-]+)(?:@([\w./-]+))?", re.IGNORECASE)
_IN_REPOSITORY = (*IN_FOLDERS, "model.onnx")  # weights first: torch needs them, and an exported file is built of them
_EXPECTED = "hf-hub:OWNER/NAME, or hf-hub:OWNER/NAME@REVISION"
_FETCHED: dict[tuple[str, str | None], Path] = {}


def fetch_remote(model: str, *, offline: bool | None = None, progress: Progress | None = None) -> Path:
    """Return a local file with the network of a repository or an address, fetching it if need be.

    Of a repository, what timm or transformers wrote beside the weights comes too: how pictures are prepared, and the
    names of the classes.

    Args:
        model: ``hf-hub:OWNER/NAME``, ``hf-hub:OWNER/NAME@REVISION``, or an address that begins with http.
        offline: Forbid (True) or allow (False) connections; None asks the environment.
        progress: Told how the download goes.

    Raises:
        UsageError: If it is neither, or an address whose file cannot be a network by its name.
        DownloadError: If it cannot be fetched, or the repository has no weights.
    """
    key = model, hub_endpoint()
    if key not in _FETCHED or not _FETCHED[key].exists():
        _FETCHED[key] = _fetch(model, offline, progress)
    return _FETCHED[key]


def pinned(model: str) -> str:
    """Return a name that means the same network tomorrow: of a repository with the commit that is taken now.

    Raises:
        UsageError, DownloadError: As ``fetch_remote``.
    """
    commit = fetch_remote(model).parent.name
    match = _REPOSITORY.fullmatch(model)
    return f"hf-hub:{match[1]}@{commit}" if match else model


def _fetch(model: str, offline: bool | None, progress: Progress | None) -> Path:
    if match := HUB_URL.fullmatch(model):
        repo, revision, file = map(unquote, match.groups())
        return _from_hub(model, repo, revision, (file,), offline, progress)
    if match := _REPOSITORY.fullmatch(model):
        return _from_hub(model, match[1], match[2] or "main", _IN_REPOSITORY, offline, progress)
    if not model.lower().startswith("http"):
        raise UsageError("This names no repository of the hub", expected=_EXPECTED, found=model)
    return _from_address(model, offline, progress)


def _from_address(url: str, offline: bool | None, progress: Progress | None) -> Path:
    file = PurePosixPath(unquote(urlsplit(url).path)).name
    if not file.lower().endswith(FILE_SUFFIXES):
        raise UsageError("This address is of no network", expected=f"a file ({', '.join(FILE_SUFFIXES)})", found=url)
    file = re.sub(r"^[^A-Za-z0-9]|[^A-Za-z0-9._+-]", "x", file)  # a name the cache takes; the digest tells them apart
    place = f"{file.partition('.')[0]}-{hashlib.sha256(url.encode()).hexdigest()[:16]}"
    source = WeightsSource("web", url, file, "", PreprocessSpec(), url)
    return fetch(place, (source,), offline=offline, progress=progress)


def _from_hub(
    model: str, repo: str, revision: str, files: tuple[str, ...], offline: bool | None, progress: Progress | None
) -> Path:
    """Return the first of some files that a repository has, or that is here of it where the hub cannot be asked."""
    from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise UsageError("This names no repository of the hub", expected=_EXPECTED, found=say(error)) from error
    if ".." in revision.split("/"):  # it names a file in the hub's cache
        raise UsageError("This names no revision of a repository", found=repr(revision))
    failure = offline_reason(offline)
    if not failure:
        try:
            return _newest(model, repo, revision, files, progress or silent)
        except DownloadError:
            raise
        except (RepositoryNotFoundError, RevisionNotFoundError) as error:
            hint = "Check the name; a private or gated one needs a token: hf auth login, or HF_TOKEN"
            raise DownloadError(f"The hub has no {model} for you", found=say(error), hint=hint) from error
        except Exception as error:  # of whatever library it stands on: httpx, requests, xet
            failure = say(error)
    if here := next(filter(None, (hub_cached(repo, revision, file) for file in files)), None):
        if not offline_reason(offline):
            warnings.warn(f"{model} is taken as it was fetched before: the hub gave up, {failure}", stacklevel=4)
        return here
    raise DownloadError(f"{model} is not here, and the hub cannot be asked", found=failure)


def _newest(model: str, repo: str, revision: str, files: tuple[str, ...], progress: Progress) -> Path:
    """Ask the hub what a repository has, and return the first of some files, fetched unless it is here already.

    What lies beside it is fetched of the same commit; the revision stands for that one once all is here.
    """
    from huggingface_hub import HfApi, hf_hub_download

    limits, endpoint = Limits(), hub_endpoint()
    facts = HfApi(endpoint=endpoint).model_info(repo, revision=revision, files_metadata=True, timeout=limits.timeout)
    sizes = {each.rfilename: each.size or 0 for each in facts.siblings or ()}
    wanted = next((file for file in files if file in sizes), None)
    if wanted is None:
        found = ", ".join(sorted(sizes)[:8]) or "no files"
        raise DownloadError(f"There are no weights in {model}", expected=" or ".join(files), found=found)
    beside = (str(PurePosixPath(wanted).with_name(name)) for name in (CONFIG, PROCESSOR))
    bar = hub_bar(lambda done, total: progress(model, done, total))
    commit = facts.sha or revision
    for file in (*(each for each in beside if each in sizes), wanted):  # last, so that with it all the rest is here
        limits.check_size(sizes[file])
        path = Path(hf_hub_download(repo, file, revision=commit, endpoint=endpoint, tqdm_class=bar))
    folder = path.parents[len(PurePosixPath(wanted).parts) + 1]  # .../snapshots/COMMIT/WANTED
    reference = folder / "refs" / revision
    if commit != revision and (not reference.is_file() or reference.read_text() != commit):
        reference.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(reference) as draft:
            draft.write_text(commit)
    return path
