"""What every peer does alike: the statements, the checks in their shortest form, the greeting."""

import re
from calendar import isleap
from datetime import UTC, date, datetime

FIND = "SELECT date_of_birth FROM users WHERE username = %s"
SAVE = """
    INSERT INTO users (username, date_of_birth) VALUES (%s, %s)
    ON CONFLICT (username) DO UPDATE SET date_of_birth = EXCLUDED.date_of_birth
"""
BAD_USERNAME = {"message": "The username must be one or more letters and nothing else."}
BAD_DATE = {"message": "dateOfBirth must be a real date before today, written YYYY-MM-DD."}
NOT_FOUND = {"message": "No date of birth is saved for this username: PUT it first."}
DATE = re.compile("[0-9]{4}-[0-9]{2}-[0-9]{2}")


def today() -> date:
    return datetime.now(UTC).date()


def is_username(text: str) -> bool:
    return text.isalpha() and len(text) <= 255


def parse_date(text: object) -> date | None:
    """Return a date before today written YYYY-MM-DD, else None."""
    try:
        born = date.fromisoformat(text if isinstance(text, str) and DATE.fullmatch(text) else "")
    except ValueError:
        return None
    return born if born < today() else None


def greeting(username: str, born: date) -> dict[str, str]:
    """Return the message with the days to the birthday; of 29 February it is 1 March in common years."""
    now = today()
    for year in (now.year, now.year + 1):
        late = (born.month, born.day) == (2, 29) and not isleap(year)
        birthday = date(year, 3, 1) if late else born.replace(year=year)
        if birthday >= now:
            break
    days = (birthday - now).days
    wish = f"Your birthday is in {days} day(s)" if days else "Happy birthday!"
    return {"message": f"Hello, {username}! {wish}"}
