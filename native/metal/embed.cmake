# Makes one text of a shader and the files it includes, as C++ string literals, since a Metal
# library is compiled from source on the machine that runs it and has no folder to look into there.
#
#   cmake -DROOT=shaders/lora.metal -DOUTPUT=shader_source.inc -P embed.cmake

cmake_minimum_required(VERSION 3.21)

# Appends a file to `text`. An #include "file" gives way to that file, the first time it is named;
# #include <file> stays.
function(append_file path)
  get_filename_component(path "${path}" ABSOLUTE)
  if(path IN_LIST seen)
    set(text "${text}" PARENT_SCOPE)
    return()
  endif()
  list(APPEND seen "${path}")
  get_filename_component(folder "${path}" DIRECTORY)
  file(READ "${path}" rest)
  string(REGEX REPLACE "#pragma once[^\n]*\n" "" rest "${rest}")
  while("\n${rest}" MATCHES "\n(#include \"([^\"\n]+)\"[^\n]*\n)")
    set(line "${CMAKE_MATCH_1}")
    set(included "${CMAKE_MATCH_2}")
    string(LENGTH "${line}" length)
    string(FIND "\n${rest}" "\n${line}" at)
    string(SUBSTRING "${rest}" 0 ${at} before)
    math(EXPR at "${at} + ${length}")
    string(SUBSTRING "${rest}" ${at} -1 rest)
    string(APPEND text "${before}")
    append_file("${folder}/${included}")
  endwhile()
  set(text "${text}${rest}" PARENT_SCOPE)
  set(seen "${seen}" PARENT_SCOPE)
endfunction()

set(text "")
set(seen "")
append_file("${ROOT}")

set(end ")SHADER\"")
string(FIND "${text}" "${end}" at)
if(NOT at EQUAL -1)
  message(FATAL_ERROR "${ROOT} holds ${end}, which ends its literal")
endif()

# In pieces of whole lines: compilers promise no more than 64 KB a literal, some 16 KB.
set(pieces "")
while(NOT text STREQUAL "")
  string(SUBSTRING "${text}" 0 8000 piece)
  string(LENGTH "${piece}" length)
  string(LENGTH "${text}" left)
  if(left GREATER length)
    string(FIND "${piece}" "\n" at REVERSE)
    math(EXPR length "${at} + 1")
    string(SUBSTRING "${text}" 0 ${length} piece)
  endif()
  string(SUBSTRING "${text}" ${length} -1 text)
  string(APPEND pieces "R\"SHADER(${piece}${end}\n")
endwhile()
file(WRITE "${OUTPUT}" "${pieces}")
