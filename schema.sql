-- The tables of hello. Safe to apply again, and by several replicas at once.
-- `python hello.py init-db` applies it; `psql -f schema.sql` with the same environment does too.

BEGIN;

-- CREATE TABLE IF NOT EXISTS can still collide with itself: whoever comes second waits here.
SELECT pg_advisory_xact_lock(hashtext('hello/schema.sql'));

CREATE TABLE IF NOT EXISTS users (
    -- "C" compares bytes: no locale's upgrade can ever corrupt the index, and it is the fastest order.
    -- The service sends names of 1 to 255 letters in NFC, of 2,500 bytes at most (an index entry holds 2,704).
    username text COLLATE "C" PRIMARY KEY,
    date_of_birth date NOT NULL
);

COMMIT;
