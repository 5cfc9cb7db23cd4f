"""The metadata services of AWS, GCP and Azure, as far as they tell that a machine is taken away."""

import json
import threading
import time
from contextlib import contextmanager
from datetime import UTC, datetime
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

QUIET_ASKS = 3
TOKEN = "a token"


class Metadata(BaseHTTPRequestHandler):
    """All three clouds' services; the notice is there after some asks."""

    def do_PUT(self):
        asked_right = self.headers["X-aws-ec2-metadata-token-ttl-seconds"]
        self.answer(TOKEN if self.path == "/latest/api/token" and asked_right else None)

    def do_GET(self):
        path, _, query = self.path.partition("?")
        cloud, content = {
            "/latest/meta-data/spot/instance-action": ("aws", self.aws),
            "/computeMetadata/v1/instance/preempted": ("gcp", self.gcp),
            "/metadata/scheduledevents": ("azure", self.azure),
            "/metadata/instance/compute/name": ("azure", lambda _: "vm_2"),
        }[path]
        header, value = {
            "aws": ("X-aws-ec2-metadata-token", TOKEN),
            "gcp": ("Metadata-Flavor", "Google"),
            "azure": ("Metadata", "true"),
        }[cloud]
        if self.headers[header] != value or (cloud == "azure" and "api-version=" not in query):
            return self.send_error(400)
        self.server.asks += not path.endswith("/name")
        self.answer(content(self.server.asks > QUIET_ASKS))

    def aws(self, told):
        at = self.server.goes.strftime("%Y-%m-%dT%H:%M:%SZ")
        return json.dumps({"action": "terminate", "time": at}) if told else None

    def gcp(self, told):
        return "TRUE" if told else "FALSE"

    def azure(self, told):
        at = format_datetime(self.server.goes, usegmt=True)
        others = {"EventType": "Preempt", "Resources": ["vm_7"], "NotBefore": at}
        reboot = {"EventType": "Reboot", "Resources": ["vm_2"], "NotBefore": at}
        mine = {"EventType": "Preempt", "Resources": ["vm_1", "vm_2"], "NotBefore": at}
        return json.dumps({"Events": [others, reboot, *([mine] if told else [])]})

    def answer(self, text):
        if text is None:
            return self.send_error(404)
        self.send_response(200)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_):
        pass


@contextmanager
def metadata_service(seconds):
    """A service whose machine goes after so many seconds; its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Metadata)
    server.asks, server.goes = 0, datetime.fromtimestamp(time.time() + seconds, UTC)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
