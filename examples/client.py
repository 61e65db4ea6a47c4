"""The course's own client: a submission in, the server's accuracy out.

    python examples/client.py http://127.0.0.1:3001/retrieval/ results/submission.json

Written from the protocol alone, as a group would: POST {"groupname", "images"}, read "accuracy".
"""

import json
import sys

import requests


def submit(results: dict, groupname: str, url: str) -> None:
    reply = requests.post(url, json.dumps({"groupname": groupname, "images": results}))
    try:
        print(f"accuracy is {reply.json()['accuracy']}")
    except (ValueError, KeyError):
        print(f"ERROR: {reply.status_code} {reply.text}")


if __name__ == "__main__":
    url, path = sys.argv[1:]
    with open(path) as file:
        submission = json.load(file)
    submit(submission["images"], submission["groupname"], url)
