-- Bytes of a row and of its index entry, for names of ten letters and of thirty-two.
INSERT INTO users
SELECT left(translate(md5(i::text), '0123456789', 'ghijklmnop'), 10), date '1990-01-01' + i % 10000
FROM generate_series(1, 250000) AS i ON CONFLICT DO NOTHING;
VACUUM ANALYZE users;
SELECT round(avg(length(username))) AS letters, count(*) AS rows, pg_table_size('users') / count(*) AS row_bytes,
    pg_indexes_size('users') / count(*) AS index_bytes FROM users;
TRUNCATE users;
INSERT INTO users SELECT translate(md5(i::text), '0123456789', 'ghijklmnop'), date '1990-01-01' + i % 10000
FROM generate_series(1, 250000) AS i;
VACUUM ANALYZE users;
SELECT round(avg(length(username))) AS letters, count(*) AS rows, pg_table_size('users') / count(*) AS row_bytes,
    pg_indexes_size('users') / count(*) AS index_bytes FROM users;
