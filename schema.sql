-- The table of hello. It is safe to apply this again, also by several clients at once.
-- `python hello.py init-db` applies it; `psql -f schema.sql` with the same environment does, too.

BEGIN;

-- CREATE TABLE IF NOT EXISTS fails if another client creates the table at the same moment.
SELECT pg_advisory_xact_lock(hashtext('hello/schema.sql'));

CREATE TABLE IF NOT EXISTS users (
    -- "C" compares bytes: no update of a locale can corrupt the index.
    username text COLLATE "C" PRIMARY KEY,
    date_of_birth date NOT NULL
);

-- What the service could not read. NOT VALID: rows of version 1.0 are not checked, and the table is not scanned.
-- Requests would wait behind ALTER TABLE while it waits for a long reader, so it gives up at once; init-db tries again.
-- One statement for each constraint: Citus refuses two in one.
DO $$
BEGIN
    IF NOT EXISTS (
        SELECT FROM pg_constraint WHERE conrelid = 'users'::regclass AND conname = 'users_username_is_nfc'
    ) THEN
        SET LOCAL lock_timeout = '20ms';
        ALTER TABLE users ADD CONSTRAINT users_username_is_nfc
            CHECK (username <> '' AND username IS NFC NORMALIZED) NOT VALID;
        ALTER TABLE users ADD CONSTRAINT users_date_of_birth_has_four_digits
            CHECK (date_of_birth BETWEEN '0001-01-01' AND '9999-12-31') NOT VALID;
    END IF;
END
$$;

COMMIT;
