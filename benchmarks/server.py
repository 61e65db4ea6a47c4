"""Groups that submit at once in; how long each waits, and the server's processor time and memory, out.

    python benchmarks/server.py --rounds 5

100 groups, each with a submission of its own, 1455 queries with 10 names, POST at the same moment. Ours is
`python -m retrieval.server`, which stores each submission on the disk before it answers. It is compared with
the dozen lines that a course would write, which store nothing: http.server's threads and the same score
(with room for 128 waiting connections instead of 5, so that none is dropped). Each server is a fresh process
that has answered one submission before. The two servers alternate, and the client is a process of its own.
"""

import argparse
import asyncio
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
QUERIES, GALLERY, PEOPLE = 1455, 3000, 250


def names_of(part: str, count: int) -> list[str]:
    """Names as on the day, 32 hex digits, below a folder of their person."""
    drawn = np.random.default_rng([len(part), count])
    return [f"person{n % PEOPLE:03}/{drawn.bytes(16).hex()}.jpg" for n in range(count)]


QUERY_NAMES, GALLERY_NAMES = names_of("query", QUERIES), names_of("gallery", GALLERY)


def lay_out(folder: Path) -> None:
    """Empty files: the server reads their names only."""
    for part, names in (("query", QUERY_NAMES), ("gallery", GALLERY_NAMES)):
        for name in names:
            (folder / part / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / part / name).touch()


def body_of(group: int) -> bytes:
    """A group's submission: ten random gallery images a query, and a right one for some."""
    drawn = np.random.default_rng(group)
    names = [name.rpartition("/")[2] for name in GALLERY_NAMES]
    rows = [drawn.choice(GALLERY, 10, replace=False).tolist() for _ in QUERY_NAMES]
    for number in drawn.choice(QUERIES, group * QUERIES // 200, replace=False).tolist():
        if number % PEOPLE not in rows[number]:
            rows[number][int(drawn.integers(10))] = number % PEOPLE
    images = {query.rpartition("/")[2]: [names[row] for row in of]
              for query, of in zip(QUERY_NAMES, rows, strict=True)}  # fmt: skip
    return json.dumps({"groupname": f"group {group}", "images": images}).encode()


# ---- the servers


def reference(port: int) -> None:
    """What a course would write."""
    label = {name.rpartition("/")[2]: name.partition("/")[0] for name in [*QUERY_NAMES, *GALLERY_NAMES]}

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            sent = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            hits = [
                [label[name] == label[query] for name in names] for query, names in sent["images"].items()
            ]
            top = {k: sum(any(row[:k]) for row in hits) / len(hits) for k in (1, 5, 10)}
            accuracy = 600 * top[1] + 300 * top[5] + 100 * top[10]
            answer = json.dumps({"groupname": sent["groupname"], "accuracy": accuracy}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(answer)))
            self.end_headers()
            self.wfile.write(answer)

        def log_message(self, *_: object) -> None:
            pass

    ThreadingHTTPServer.request_queue_size = 128
    ThreadingHTTPServer(("127.0.0.1", port), Handler).serve_forever()


def command_of(program: str, folder: Path, port: int, database: Path) -> list[str]:
    """What starts it."""
    if program == "reference":
        return [sys.executable, __file__, "--serve", str(port)]
    return [sys.executable, "-m", "retrieval.server", "--port", str(port), "--database", str(database),
            "--query_dir", str(folder / "query"), "--gallery_dir", str(folder / "gallery")]  # fmt: skip


# ---- the hall


async def submit(body: bytes, port: int, start: float) -> tuple[float, float]:
    """POST on a connection of its own: the seconds until the whole answer is there, and its score."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=2**22)
    writer.write(b"POST /retrieval/ HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
                 b"Content-Length: %d\r\n\r\n" % len(body))  # fmt: skip
    writer.write(body)
    head, _, answer = (await reader.read(-1)).partition(b"\r\n\r\n")
    taken = time.perf_counter() - start
    writer.close()
    if b" 200 " not in head.partition(b"\r\n")[0]:
        raise SystemExit(f"{head!r} {answer[:300]!r}")
    return taken, json.loads(answer)["accuracy"]


async def hall(port: int, groups: int) -> list[tuple[float, float]]:
    """All of them at once, after one alone."""
    bodies = [body_of(group) for group in range(groups + 1)]
    await submit(bodies.pop(), port, 0)
    start = time.perf_counter()
    return await asyncio.gather(*(submit(body, port, start) for body in bodies))


def measure(program: str, folder: Path, port: int, groups: int) -> dict:
    """One round of one server."""
    with tempfile.TemporaryDirectory(dir=folder) as place:
        command = command_of(program, folder, port, Path(place) / "competition.sqlite")
        server = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
        try:
            wait_for(port)
            client = [sys.executable, __file__, "--submit", str(port), "--groups", str(groups)]
            before = processor_seconds(server.pid)
            output = subprocess.run(client, stdout=subprocess.PIPE, check=True, text=True).stdout
            used = processor_seconds(server.pid) - before
            status = Path(f"/proc/{server.pid}/status").read_text()
        finally:
            server.terminate()
            server.wait()
    seconds, scores = zip(*json.loads(output), strict=True)
    peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    return {"median": statistics.median(seconds), "p99": float(np.percentile(seconds, 99)),
            "rate": groups / max(seconds), "processor": used / (groups + 1), "memory": peak / 1024,
            "scores": scores}  # fmt: skip


def processor_seconds(process: int) -> float:
    """What it has used so far, of all cores together."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def wait_for(port: int) -> None:
    """Until somebody listens."""
    for _ in range(400):
        with socket.socket() as tried:
            if not tried.connect_ex(("127.0.0.1", port)):
                return
        time.sleep(0.05)
    raise SystemExit("the server does not start")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--groups", type=int, default=100)
    parser.add_argument("--port", type=int, default=3991)
    parser.add_argument("--folder", type=Path, help="where the databases lie, since a disk's speed counts")
    parser.add_argument("--serve", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--submit", type=int, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.serve:
        reference(arguments.serve)
    elif arguments.submit:
        print(json.dumps(asyncio.run(hall(arguments.submit, arguments.groups))))
    else:
        compare(arguments.rounds, arguments.groups, arguments.port, arguments.folder)


def compare(rounds: int, groups: int, port: int, place: Path | None) -> None:
    """Both in turn, and the ratios of each pair."""
    pairs = []
    with tempfile.TemporaryDirectory(dir=place) as folder:
        lay_out(Path(folder))
        for _ in range(rounds):
            pair = {name: measure(name, Path(folder), port, groups) for name in ("reference", "ours")}
            if not np.allclose(pair["reference"]["scores"], pair["ours"]["scores"]):
                raise SystemExit("the two give other scores")
            pairs.append(pair)
            for name, found in pair.items():
                print(f"{name:9} median {found['median']:.2f} s, 99th percentile {found['p99']:.2f} s,"
                      f" {found['rate']:.0f} submissions a second,"
                      f" {found['processor'] * 1000:.0f} ms of processor each,"
                      f" {found['memory']:.0f} MB at most")  # fmt: skip
    print(f"n = {rounds} rounds of {groups}, {os.cpu_count()} cores; reference / ours, median and range:")
    for figure in ("median", "p99", "rate", "processor", "memory"):
        ratios = [pair["reference"][figure] / pair["ours"][figure] for pair in pairs]
        print(f"{figure:9} {statistics.median(ratios):.2f}, {min(ratios):.2f} to {max(ratios):.2f}")


if __name__ == "__main__":
    main()
