"""Files of Hugging Face datasets: taken from this machine where they are here, downloaded where they are not."""

import os
import queue
import re
import threading
from pathlib import Path

from harness.common import first_line, sha256
from harness.documents import parquet_batches

REPOSITORIES = {"climbmix": "karpathy/climbmix-400b-shuffle", "tinystories": "karpathy/tinystories-gpt4-clean"}
WORKERS = 4  # files at once
ATTEMPTS = 4  # of a connection, and of a whole file
TIMEOUT = (10, 30)  # seconds to connect, seconds without a byte
RETRY_SECONDS = 1.0  # before another attempt; doubles with each
LONGEST_WAIT = 60  # seconds, whatever Retry-After asks for
RETRIED = (408, 429, 500, 502, 503, 504)  # answers that may be better next time
CHUNK_BYTES = 1 << 14
TOKEN_ADVICE = {  # by HTTP status
    401: "set HF_TOKEN to a valid token, see https://huggingface.co/settings/tokens",
    403: "set HF_TOKEN to a token that may read it, see https://huggingface.co/settings/tokens",
    429: "set HF_TOKEN, with which Hugging Face allows more requests",
}
ADVICE = "check the network or name a mirror in HF_ENDPOINT"


class DownloadError(Exception):
    """A file could not be had. Its text is one line: file, reason, way out."""


# --------------------------------------
# All files


def fetch(folder, dataset, names):
    """
    Files of a dataset, a key of REPOSITORIES, as a list of paths in the order of `names`.

    They are looked for in `folder`, then in Hugging Face's cache. The others are downloaded into `folder`, in parallel;
    what is there in part is completed. Raises SystemExit, in one line, if a file can't be had, and after Ctrl-C.
    """
    folder.mkdir(parents=True, exist_ok=True)
    paths = {name: folder / name for name in names}
    missing = [name for name in names if not paths[name].exists()]
    if not missing:
        return list(paths.values())

    # Imported late, for it takes a moment.
    from huggingface_hub import constants, get_token, try_to_load_from_cache

    # `hf download` may have been here.
    for name in missing:
        cached = try_to_load_from_cache(REPOSITORIES[dataset], name, constants.HF_HUB_CACHE, repo_type="dataset")
        if isinstance(cached, str):
            paths[name] = Path(cached)
            print(f"{dataset}: {name} is here, in Hugging Face's cache", flush=True)
    missing = [name for name in missing if not paths[name].exists()]
    if missing and constants.HF_HUB_OFFLINE:
        raise SystemExit(
            f"{missing[0]} is neither in {folder} nor in {constants.HF_HUB_CACHE}, and HF_HUB_OFFLINE forbids a "
            "download: unset that, or use --dataset local"
        )
    if missing:
        endpoint = (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")
        url = f"{endpoint}/datasets/{REPOSITORIES[dataset]}/resolve/main"
        token = get_token()
        if token and not token.isascii():
            raise SystemExit("HF_TOKEN has characters that are in no token: set it again, or unset it")
        download_all(dataset, {f"{url}/{name}": paths[name] for name in missing}, token)
    return list(paths.values())


def download_all(dataset, files, token):
    """Download `files`, {url: path}. The first failure, and Ctrl-C, end it at once: no server can hold it up."""
    jobs = queue.SimpleQueue()
    results = queue.SimpleQueue()
    stop = threading.Event()
    for job in files.items():
        jobs.put(job)

    # Daemons, because the process does not wait for those when it ends.
    for _ in range(min(WORKERS, len(files))):
        threading.Thread(target=work, args=(jobs, results, token, stop), daemon=True).start()
    try:
        for count in range(1, len(files) + 1):
            result = results.get()
            if isinstance(result, DownloadError):
                raise SystemExit(str(result))
            if isinstance(result, Exception):
                raise result
            print(f"{dataset}: {count} of {len(files)} files, {result.name} is here", flush=True)
    except KeyboardInterrupt:
        print("interrupted; run this again to resume", flush=True)
        raise SystemExit(130) from None
    finally:
        stop.set()


def work(jobs, results, token, stop):
    """The work of a thread: download one file after the other. A result is a path or an exception."""
    session = None
    while not stop.is_set():
        try:
            url, path = jobs.get_nowait()
        except queue.Empty:
            return
        try:
            session = session or new_session(token)
            download(session, url, path, stop)
            results.put(path)
        except Exception as error:  # the main thread decides what becomes of it
            results.put(error)


# --------------------------------------
# One file


def new_session(token):
    """A requests.Session that connects ATTEMPTS times, with pauses, and obeys Retry-After."""
    import requests
    from urllib3.util import Retry

    retry = Retry(
        total=ATTEMPTS - 1,
        status_forcelist=RETRIED,
        raise_on_status=False,
        backoff_factor=RETRY_SECONDS,
        backoff_jitter=RETRY_SECONDS,
        retry_after_max=LONGEST_WAIT,
    )

    # requests drops this header when another host is redirected to. A header of the session's own would give way to
    # a password in ~/.netrc.
    def authorize(request):
        request.headers["Authorization"] = f"Bearer {token}"
        return request

    session = requests.Session()
    session.mount("https://", requests.adapters.HTTPAdapter(max_retries=retry))
    session.mount("http://", requests.adapters.HTTPAdapter(max_retries=retry))
    if token:
        session.auth = authorize
    return session


def download(session, url, path, stop):
    """
    Download one parquet file. Its name appears when it is complete; until then it is the same name with ".part".

    Raises DownloadError when the server has refused it, or ATTEMPTS bodies in a row were cut off or bad.
    """
    import requests

    part = path.with_name(path.name + ".part")
    for attempt in range(ATTEMPTS):
        if attempt and stop.wait(RETRY_SECONDS * 2 ** (attempt - 1)):
            break
        with ask(session, url, part) as response:
            # What arrived before a body was cut off is kept, and the next attempt goes on behind it.
            try:
                receive(response, part, stop)
            except requests.RequestException as error:
                reason = first_line(error)
                continue
        reason = find_fault(part, response)
        if reason is None:
            os.replace(part, path)
            return
        part.unlink()
    raise failure(url, reason, ADVICE)


def failure(url, reason, advice):
    ways_out = f"{advice}, and run this again (it resumes); offline, use --dataset local"
    return DownloadError(f"could not download {url}: {reason}; {ways_out}")


def ask(session, url, part):
    """Request what is not in `part` yet. Returns the response, whose body is still to come."""
    import requests

    headers = {"Accept-Encoding": "identity"}
    if part.exists() and part.stat().st_size:
        headers["Range"] = f"bytes={part.stat().st_size}-"
    try:
        response = session.get(url, headers=headers, stream=True, timeout=TIMEOUT)
    except requests.RequestException as error:
        # The reason lies within: around it are the attempts.
        cause = error.args[0] if error.args else error
        raise failure(url, first_line(getattr(cause, "reason", cause)), ADVICE) from None

    # 416 says that there is nothing behind what we have.
    status = response.status_code
    if status in (200, 206, 416):
        return response
    response.close()
    raise failure(url, f"HTTP {status} {response.reason}", TOKEN_ADVICE.get(status, ADVICE))


def receive(response, part, stop):
    """Write the body of a response, or add it if it is the rest that we asked for."""
    if response.status_code == 416:
        return
    mode = "wb"
    if response.status_code == 206:
        mode = "ab"
    with open(part, mode) as file:
        for chunk in response.iter_content(CHUNK_BYTES):
            file.write(chunk)
            if stop.is_set():
                raise DownloadError("another download failed")


def find_fault(part, response):
    """Why a complete file is bad: not the announced one, or no parquet file with text. None if it is good."""
    # Hugging Face announces the hash with the redirection to its store.
    for reply in (*response.history, response):
        tag = re.fullmatch(r'(?:W/)?"?([0-9a-f]{64})"?', reply.headers.get("X-Linked-ETag", ""))
        if tag and tag[1] != sha256(part):
            return "its sha256 is not the one that the server announced"
    try:
        next(parquet_batches(part), None)
    except SystemExit as error:
        return str(error)
    return None
