//! Progress on a terminal as bars with ETA, otherwise as plain lines.
