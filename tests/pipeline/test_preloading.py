"""The tests' own server of jobs takes them, whatever the other tests of a worker have imported."""

import json
import socket

import preloading
from preloading import sensitive


def test_the_server_takes_jobs_with_the_environment_of_the_tests():
    environment = preloading.environment()
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as asking:
        asking.connect(environment["PRELOADED"])
        read = json.loads(asking.makefile().readline())
    assert read == sensitive(environment)  # else each job imports torch by itself, without a word
