"""Every limit of the HTTP face in one place; docs and tests read them here. Sizes in bytes, times in seconds."""

from __future__ import annotations

MAX_BODY_BYTES = 8 * 2**20
MAX_HEADER_BYTES = 16 * 2**10  #: all names and values together
MAX_HEADERS = 100
MAX_URL_BYTES = 8 * 2**10
MAX_HEAD_BYTES = (
    MAX_HEADER_BYTES + MAX_URL_BYTES + 8 * 2**10
)  #: request line, headers and their punctuation, as received
MAX_FRAMING_FACTOR = 8  #: bytes on the wire for a byte of a chunked body (one-byte chunks take 6), past MAX_HEAD_BYTES
HEADER_TIMEOUT_S = 10.0  #: from the connection (or the head's first byte) to the head's end
BODY_TIMEOUT_S = 30.0  #: from the head's end to the body's
#: that a connection is kept after an answer. Longer than clients and load balancers keep theirs (60 to 90 as a rule): who closes
#: first must be the one who sends, or a request crosses the close and is lost.
KEEP_ALIVE_S = 120.0

MAX_JSON_DEPTH = 64
MAX_JSON_KEYS = 4096  #: of one object
MAX_MESSAGES = 4096
MAX_CHOICES = 8  #: n
MAX_PROMPTS = 64
MAX_SEQUENCES = 64  #: prompts times n
MAX_STOPS = 4
MAX_STOP_CHARACTERS = 4096  #: of one; the matcher costs the same for long ones
MAX_STOP_TOKENS = 64
MAX_LOGIT_BIASES = 1024
MAX_TOP_LOGPROBS = 20
MAX_COMPLETION_LOGPROBS = 5
