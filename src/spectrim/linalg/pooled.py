"""What few samples tell, beside what is known from calibration."""

from __future__ import annotations

from spectrim.linalg.moments import Moments


def pooled(now: Moments, known: Moments, share: float) -> Moments:
    """Moments of samples of which this share is as ``now``, and the others as they are ``known``."""
    if share >= 1 or not known.count:
        return now
    # So many observations that the ridge is that of what is known.
    total = max(known.count, 2)
    count = min(max(round(share * total), 1), total - 1)
    result = now.standing_for(count)
    result.merge(known.standing_for(total - count))
    return result
