"""python examples/fault_event.py tcp://127.0.0.1:7002 tcp://127.0.0.1:7003 mask 2"""

import os
import sys

import msgpack
import zmq

context = zmq.Context()
publisher, subscriber = context.socket(zmq.PUB), context.socket(zmq.SUB)
publisher.connect(sys.argv[1])
subscriber.connect(sys.argv[2])
subscriber.subscribe("event")
fault = {"type": "fault", "id": os.urandom(4).hex(), "action": sys.argv[3], "rank": int(sys.argv[4])}
status = ""
while status not in ("done", "failed", "refused"):
    publisher.send_multipart([b"fault", msgpack.packb(fault)])  # repeats are harmless; the first ones may be lost
    while status not in ("done", "failed", "refused") and subscriber.poll(200):
        event = msgpack.unpackb(subscriber.recv_multipart()[1])
        if event.get("id") == fault["id"]:
            status = event["status"]
            print(event)
