// The Go peer of `make bench`: net/http with pgx's pool and prepared statements, and the answers of the other peers.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"log"
	"net/http"
	"os"
	"strconv"
	"strings"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/jackc/pgx/v4"
	"github.com/jackc/pgx/v4/pgxpool"
)

const (
	findSQL = `SELECT date_of_birth FROM users WHERE username = $1`
	saveSQL = `INSERT INTO users (username, date_of_birth) VALUES ($1, $2)
		ON CONFLICT (username) DO UPDATE SET date_of_birth = EXCLUDED.date_of_birth`
	maxContentBytes = 4096
)

type message struct {
	Message string `json:"message"`
}

type person struct {
	DateOfBirth string `json:"dateOfBirth"`
}

type server struct {
	pool *pgxpool.Pool
}

func (s *server) hello(w http.ResponseWriter, r *http.Request) {
	username := strings.TrimPrefix(r.URL.Path, "/hello/")
	switch r.Method {
	case http.MethodGet, http.MethodHead:
		s.get(w, r, username)
	case http.MethodPut:
		s.put(w, r, username)
	default:
		w.Header().Set("Allow", "GET, HEAD, PUT")
		respond(w, http.StatusMethodNotAllowed, "The method must be one of GET, HEAD, PUT.")
	}
}

func (s *server) get(w http.ResponseWriter, r *http.Request, username string) {
	if !isUsername(username) {
		badUsername(w)
		return
	}
	var born time.Time
	err := s.pool.QueryRow(r.Context(), "find", username).Scan(&born)
	switch {
	case errors.Is(err, pgx.ErrNoRows):
		respond(w, http.StatusNotFound, "No date of birth is saved for this username: PUT it first.")
	case err != nil:
		unavailable(w)
	default:
		respond(w, http.StatusOK, greeting(username, born, today()))
	}
}

func (s *server) put(w http.ResponseWriter, r *http.Request, username string) {
	if !isUsername(username) {
		badUsername(w)
		return
	}
	var body person
	err := json.NewDecoder(http.MaxBytesReader(w, r.Body, maxContentBytes)).Decode(&body)
	born, parseErr := time.Parse("2006-01-02", body.DateOfBirth)
	if err != nil || parseErr != nil || !born.Before(today()) {
		respond(w, http.StatusBadRequest, "dateOfBirth must be a real date before today, written YYYY-MM-DD.")
		return
	}
	if _, err := s.pool.Exec(r.Context(), "save", username, born); err != nil {
		unavailable(w)
		return
	}
	w.WriteHeader(http.StatusNoContent)
}

func isUsername(text string) bool {
	for _, letter := range text {
		if !unicode.IsLetter(letter) {
			return false
		}
	}
	return text != "" && utf8.RuneCountInString(text) <= 255
}

func today() time.Time {
	return time.Now().UTC().Truncate(24 * time.Hour)
}

// greeting returns the message with the days to the birthday. Go's time.Date makes 1 March of 29 February in common years.
func greeting(username string, born, today time.Time) string {
	birthday := time.Date(today.Year(), born.Month(), born.Day(), 0, 0, 0, 0, time.UTC)
	if birthday.Before(today) {
		birthday = time.Date(today.Year()+1, born.Month(), born.Day(), 0, 0, 0, 0, time.UTC)
	}
	if days := int(birthday.Sub(today).Hours() / 24); days > 0 {
		return fmt.Sprintf("Hello, %s! Your birthday is in %d day(s)", username, days)
	}
	return fmt.Sprintf("Hello, %s! Happy birthday!", username)
}

func respond(w http.ResponseWriter, status int, text string) {
	w.Header().Set("Content-Type", "application/json")
	w.WriteHeader(status)
	json.NewEncoder(w).Encode(message{text})
}

func badUsername(w http.ResponseWriter) {
	respond(w, http.StatusBadRequest, "The username must be one or more letters and nothing else.")
}

func unavailable(w http.ResponseWriter) {
	respond(w, http.StatusServiceUnavailable, "The database does not answer.")
}

func newPool(ctx context.Context) (*pgxpool.Pool, error) {
	config, err := pgxpool.ParseConfig("")
	if err != nil {
		return nil, err
	}
	connections, err := strconv.Atoi(os.Getenv("CONNECTIONS"))
	if err != nil {
		return nil, err
	}
	config.MaxConns = int32(connections)
	config.AfterConnect = func(ctx context.Context, conn *pgx.Conn) error {
		if _, err := conn.Prepare(ctx, "find", findSQL); err != nil {
			return err
		}
		_, err := conn.Prepare(ctx, "save", saveSQL)
		return err
	}
	return pgxpool.ConnectConfig(ctx, config)
}

func main() {
	pool, err := newPool(context.Background())
	if err != nil {
		log.Fatal(err)
	}
	mux := http.NewServeMux()
	mux.HandleFunc("/hello/", (&server{pool}).hello)
	log.Fatal(http.ListenAndServe("127.0.0.1:"+os.Getenv("PORT"), mux))
}
