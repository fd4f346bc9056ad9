-- GET or PUT of random users for wrk. Arguments: method, number of users, seed.
-- A username is "User" and seven digits, written as the letters a to j.

local LETTERS = {}
for digit = 0, 9 do LETTERS[tostring(digit)] = string.char(97 + digit) end

function init(arguments)
  local method, users, seed = arguments[1], tonumber(arguments[2]), arguments[3]
  math.randomseed(tonumber(seed))
  local host = "\r\nHost: " .. wrk.headers["Host"] .. "\r\n"

  function request()
    local name = "User" .. string.format("%07d", math.random(0, users - 1)):gsub("%d", LETTERS)
    if method == "GET" then return "GET /hello/" .. name .. " HTTP/1.1" .. host .. "\r\n" end
    local born = string.format("%d-%02d-%02d", math.random(1930, 2020), math.random(1, 12), math.random(1, 28))
    return "PUT /hello/" .. name .. " HTTP/1.1" .. host .. "Content-Type: application/json\r\nContent-Length: 29\r\n\r\n"
      .. '{"dateOfBirth": "' .. born .. '"}'
  end
end

function done(summary, latency)
  local errors = summary.errors
  io.write(string.format("\nRESULT %d %d %d %d\n", summary.requests, summary.duration, latency:percentile(99),
    errors.connect + errors.read + errors.write + errors.status + errors.timeout))
end
